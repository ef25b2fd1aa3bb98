"""Which images a data set holds and where their bytes lie: folders, lists, shards, Hugging Face sets, listed alike."""

import codecs
import hashlib
import io
import os
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from data import hf
from data.batch import DataError, Split
from data.classes import numbered_classes
from data.files import MAX_IMAGE_BYTES, lines_of, read_bounded, reading, why_not
from data.shards import MANIFEST, Places, read_shards

EXCLUDE_FILE = "exclude.txt"
SPLITS: tuple[Split, ...] = ("train", "val")
# What Pillow and DALI both decode; MPO is the JPEG of cameras that store several pictures in it.
FORMATS = {"JPEG", "MPO", "PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000"}
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
DALI_SCHEMES = ("s3", "gs")
LISTED_TOGETHER = 16
"""Class folders that are listed at a time: a network file system takes its time for each."""
EXPECTED = "PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg, file lists PATH/train.txt and PATH/val.txt, or shards"


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The images of one split."""

    root: Path
    names: list[str]
    """What an image is called in messages and exclude lists, CLASS/FILE; where it is a file, its path from the root."""
    labels: np.ndarray
    """int64 (N,), index into `classes`."""
    classes: list[str]
    places: Places | None = None
    """Where the images lie within larger files; None where each is a file."""
    num_excluded: int = 0
    """Images that an exclude list took out."""
    unmatched: tuple[str, ...] = ()
    """Lines of the exclude list that match nothing in either split."""
    passed_over: tuple[str, ...] = ()
    """What lies in an image folder but is none of its images, by name or place: CLASS/FILE, CLASS/FOLDER or FILE."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Class -> why its folder cannot be listed."""

    def path(self, index: int) -> str:
        """The image's own file; only where `places` is None. Object storage's s3://... is left as it is."""
        name = self.names[index]
        # os.path.join: called for every image, and Path is 10 times slower.
        return name if is_remote(name) else os.path.join(self.root, name)  # noqa: PTH118

    def where(self, index: int) -> str:
        """The image's place in words for the user."""
        return self.path(index) if self.places is None else f"{self.places.shard_path(index)}: {self.names[index]}"

    def read(self, index: int) -> bytes:
        """The image's bytes as stored. OSError if they cannot be read, or are too many for an image."""
        if self.places is not None:
            return self.places.read(index)
        return read_bounded(self.path(index), MAX_IMAGE_BYTES)

    def only(self, kept: list[int]) -> "ImageList":
        """The images at these indices, in their order; `num_excluded` stays."""
        places = None if self.places is None else self.places.only(kept)
        names = [self.names[index] for index in kept]
        return replace(self, names=names, labels=self.labels[kept], places=places)

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Images of each shard or Arrow file; empty where each image is a file."""
        return () if self.places is None else self.places.shard_sizes

    @cached_property
    def digest(self) -> str:
        """Changes with images, names, labels, classes and shards; contents are not read.

        In a file list an image can get another class, or a class another number, under the same names.
        """
        parts = [os.fsencode("\n".join(part)) for part in (self.names, self.classes, map(str, self.shard_sizes))]
        return hashlib.sha256(b"\0".join([*parts, self.labels.astype("<i8").tobytes()])).hexdigest()[:16]


def list_splits(path: str | Path, exclude: str | Path = "") -> tuple[ImageList, ImageList]:
    """The images of training and validation, less those that the exclude list names.

    exclude: the list; PATH/exclude.txt, if there is one, where empty. Raises DataError if PATH is no data set, a class
    is empty, none is left, or the classes of the two splits differ. A label means the same class in both: that of
    training, where the two number theirs differently, as a file list and a folder with numbers for classes do.
    """
    excluded = read_exclude_list(exclude_file(path, exclude), must_exist=bool(exclude))
    found = {split: list_split(path, split) for split in SPLITS}
    unmatched = _unmatched(found, excluded)
    train, val = (replace(_without(images, split, excluded), unmatched=unmatched) for split, images in found.items())
    if not (train.classes or val.classes):
        raise DataError(
            f"{path}: the exclude list leaves out every class: launch/prepare.py check says why, the usual reason is "
            "that train/ and val/ have no class in common"
        )
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        named = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        raise DataError(
            f"{path}: train/ has {len(train.classes)} classes, val/ {len(val.classes)}, "
            f"and they differ in {named}: both need the same ones; launch/prepare.py check can leave these out"
        )
    return train, with_classes(val, train.classes)


def hold_out(images: ImageList, per_class: int) -> tuple[ImageList, ImageList]:
    """(the images without, the images with) `per_class` of each class, drawn once and for all, in the order they had.

    DataError where a class has no more than that.
    """
    counts = np.bincount(images.labels, minlength=len(images.classes))
    if per_class >= counts.min():
        raise DataError(
            f"held_out: found {per_class}, but class {images.classes[counts.argmin()]!r} has {counts.min()} training "
            f"images; allowed: up to {counts.min() - 1}"
        )
    is_held = np.zeros(len(images.labels), dtype=bool)
    for label in range(len(images.classes)):
        members = np.flatnonzero(images.labels == label)
        is_held[np.random.Generator(np.random.PCG64([0, label])).permutation(members)[:per_class]] = True
    return images.only(np.flatnonzero(~is_held).tolist()), images.only(np.flatnonzero(is_held).tolist())


def list_validation(path: str | Path, exclude: str | Path = "") -> ImageList:
    """The images of validation as `list_splits` gives them. Without a training split beside them, labels follow the
    order of their own classes.
    """
    if has_split(path, "train"):
        return list_splits(path, exclude)[1]
    excluded = read_exclude_list(exclude_file(path, exclude), must_exist=bool(exclude))
    excluded = {name: reason for name, reason in excluded.items() if not name.startswith("train/")}
    found = list_split(path, "val")
    return replace(_without(found, "val", excluded), unmatched=_unmatched({"val": found}, excluded))


def has_split(path: str | Path, split: str) -> bool:
    """Whether a data set has this split, in whatever form."""
    with reading(folder_of(path)):
        if hf.is_set(path):
            return hf.has_split(folder_of(path), split)
        return any((Path(path) / name).exists() for name in (split, f"{split}.txt"))


def list_split(path: str | Path, split: str) -> ImageList:
    """All images of one split as they are found, classes without images included; DataError if there are none."""
    with reading(folder_of(path)):
        return _list_rows(folder_of(path), split) if hf.is_set(path) else _list_split(path, split)


def folder_of(path: str | Path) -> Path:
    """Where a data set lies."""
    return hf.folder_of(path) if hf.is_set(path) else Path(path)


def _list_split(path: str | Path, split: str) -> ImageList:
    root, lines = Path(path) / split, Path(path) / f"{split}.txt"
    if not Path(path).is_dir():
        hint = "object storage is read through file lists in a folder here; " if is_remote(str(path)) else ""
        raise DataError(
            f"{path}: there is no such folder; {hint}expected {EXPECTED}: "
            "set data.path, or data.prepare to make a data set there"
        )
    if lines.is_file():
        if root.exists():
            raise DataError(f"{path}: found both {lines.name} and {split}/: move one of them away")
        return _list_lines(lines)
    if (root / MANIFEST).is_file():
        names, labels, classes, places = read_shards(root)
        return ImageList(root=root, names=names, labels=labels, classes=classes, places=places)
    if hf.has_split(Path(path), split):
        raise DataError(f"{path}: is a Hugging Face set: call it {hf.PREFIX}{path}")
    return _list_folder(root)


def exclude_file(path: str | Path, exclude: str | Path) -> Path:
    """Where the exclude list of a data set is, or would be."""
    return Path(exclude) if exclude else folder_of(path) / EXCLUDE_FILE


def read_exclude_list(file: Path, must_exist: bool) -> dict[str, str]:
    """SPLIT/CLASS/FILE, or SPLIT/CLASS/ for a whole class -> reason, empty where the list gives none.

    A line each, the reason behind a tab. DataError if the list cannot be read, or is not there though it must be.
    """
    try:
        lines = [os.fsdecode(line) for line in _without_mark(lines_of(file))]
    except FileNotFoundError as error:
        if must_exist:
            raise DataError(f"exclude: there is no {file}; launch/prepare.py check writes such a list") from error
        return {}
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines) if name}


def scheme_of(name: str) -> str:
    """What an image's name begins with where it is no file here, such as s3 of s3://bucket/key.jpg; else empty."""
    found = SCHEME.match(name)
    return found[1].lower() if found else ""


def is_remote(name: str) -> bool:
    """Whether an image is no file here, but lies in object storage."""
    return bool(scheme_of(name))


def require_schemes(allowed: Collection[str], *splits: ImageList) -> None:
    """DataError if an image's name begins with a scheme other than these, which are those that the caller reads."""
    for images in splits:
        for name in filter(is_remote, images.names):
            if scheme_of(name) not in allowed:
                raise DataError(
                    f"{name}: {scheme_of(name)}:// is not read here; files of this machine are, and in training with "
                    f"the loader 'dali' {' and '.join(f'{scheme}://' for scheme in DALI_SCHEMES)}: mount or copy the "
                    "images"
                )


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def open_image(content: bytes, mode: str) -> Image.Image:
    """Decode to a Pillow image of `mode` (RGB or L); many types of error for what is no whole image of FORMATS."""
    if not content:
        raise UnidentifiedImageError("the file is empty")
    with Image.open(io.BytesIO(content)) as image:
        if image.format not in FORMATS:  # whatever the file is called
            raise UnidentifiedImageError(f"{image.format}, which DALI does not decode")
        if image.mode.startswith("I"):  # I;16, and I for the same files in older versions
            # Pillow's own conversion cuts 16 bits off at 255, so everything but black turns white; DALI scales.
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert(mode)
        return image.convert(mode)


def in_words(error: Exception) -> str:
    """Why an image cannot be read, on one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file, or a link to nowhere"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Pillow names the buffer that it read; the caller names the file.
    return " ".join(str(error).split()).split(" <_io.BytesIO")[0] or type(error).__name__


def _list_rows(folder: Path, split: str) -> ImageList:
    """A split of a Hugging Face set, row by row."""
    names, labels, classes, places = hf.read_rows(folder, split)
    return ImageList(root=folder / split, names=names, labels=labels, classes=classes, places=places)


def _list_folder(root: Path) -> ImageList:
    """ROOT/CLASS/FILE in sorted order, without hidden ones."""
    if not root.is_dir():
        tars = "; the tar files beside it belong into train/ and val/, for launch/prepare.py index"
        hint = tars if any(root.parent.glob("*.tar")) else ""
        raise DataError(f"{root}: there is no such folder; expected {EXPECTED}{hint}")
    try:
        entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
        # A link to nowhere counts as a class, so that it is not passed over.
        classes = sorted(entry.name for entry in entries if entry.is_dir() or not Path(entry.path).exists())
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if not classes:
        no_manifest = f"tar files without {MANIFEST}: launch/prepare.py index {root.parent} makes it"
        found = no_manifest if any(root.glob("*.tar")) else f"no class folders; expected {EXPECTED}"
        raise DataError(f"{root}: found {found}")
    names, counts, unreadable = [], [], {}
    passed_over = sorted(entry.name for entry in entries if is_image_name(entry.name) and entry.name not in classes)
    with ThreadPoolExecutor(LISTED_TOGETHER) as pool:
        found = list(pool.map(_members, (root / class_name for class_name in classes)))
    for class_name, (members, why) in zip(classes, found, strict=True):
        if why:
            unreadable[class_name] = why
        images = sorted(filter(is_image_name, members))
        names += [f"{class_name}/{name}" for name in images]
        counts.append(len(images))
        passed_over += [f"{class_name}/{name}" for name in sorted(set(members).difference(images))]
    labels = np.repeat(np.arange(len(classes)), counts)
    return ImageList(
        root=root,
        names=names,
        labels=labels,
        classes=classes,
        passed_over=tuple(passed_over),
        unreadable=unreadable,
    )


def _members(folder: Path) -> tuple[list[str], str]:
    """What lies in a class folder, without what is hidden, in any order; or why that cannot be known."""
    try:
        return [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")], ""
    except OSError as error:
        return [], in_words(error)


def _list_lines(file: Path) -> ImageList:
    """A file list: `FILE CLASS` a line, in its order; relative files from the list's folder, blank lines left out.

    CLASS is what follows the last tab or blank. Classes that are numbers are sorted as such.
    """
    names, found = [], []
    try:
        lines = [line.decode() for line in _without_mark(lines_of(file))]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({why_not(error)})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            *name, class_name = line.strip().rsplit("\t" if "\t" in line else None, maxsplit=1)
            if not name:
                raise DataError(f"{file}, line {number}: found {line!r}, expected FILE CLASS")
            names += name
            found.append(class_name)
    if not names:
        raise DataError(f"{file}: lists no images; expected FILE CLASS on each line")
    classes, labels = numbered_classes(found)
    return ImageList(root=file.parent, names=names, labels=labels, classes=classes)


def _without_mark(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a text, the first without the mark that some editors begin a UTF-8 file with."""
    return (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line for number, line in enumerate(lines))


def with_classes(images: ImageList, classes: list[str]) -> ImageList:
    """The images with labels that are places in `classes`, which may be theirs in another order.

    DataError, with the first difference, if they are other classes.
    """
    if images.classes == classes:
        return images
    unknown = set(images.classes) - set(classes)
    missing = set(classes) - set(images.classes)
    if unknown or missing:
        differences = [f"{name!r} is not the network's" for name in sorted(unknown)[:1]]
        differences += [f"the network's {name!r} is not there" for name in sorted(missing)[:1]]
        raise DataError(
            f"{images.root}: found {len(images.classes)} classes, the network has {len(classes)}, and "
            f"{', '.join(differences)}: labels are matched by name, so name the classes as in the network's training"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    new_labels = np.array([label_of[name] for name in images.classes], dtype=np.int64)
    return replace(images, classes=classes, labels=new_labels[images.labels])


def _unmatched(splits: dict[str, ImageList], excluded: dict[str, str]) -> tuple[str, ...]:
    """The names that are neither an image's nor a class's."""
    left = dict(excluded)
    for split, images in splits.items() if excluded else ():
        for name in (*images.names, *(f"{class_name}/" for class_name in images.classes)):
            left.pop(f"{split}/{name}", None)
    return tuple(left)


def _without(images: ImageList, split: str, excluded: dict[str, str]) -> ImageList:
    """The images less the excluded ones and the excluded classes; DataError if a class is left empty."""
    kept_labels = [label for label, name in enumerate(images.classes) if f"{split}/{name}/" not in excluded]
    new_labels = {old: new for new, old in enumerate(kept_labels)}
    classes = [images.classes[label] for label in kept_labels]
    kept = [
        index
        for index, (name, label) in enumerate(zip(images.names, images.labels.tolist(), strict=True))
        if label in new_labels and f"{split}/{name}" not in excluded
    ]
    labels = np.array([new_labels[label] for label in images.labels[kept].tolist()], dtype=np.int64)
    for class_name, count in zip(classes, np.bincount(labels, minlength=len(classes)), strict=True):
        if count == 0 and images.classes.index(class_name) in images.labels:
            raise DataError(
                f"{images.root}: the exclude list leaves out every image of class {class_name!r}: keep one, or leave "
                f"out the class in both splits (train/{class_name}/ and val/{class_name}/ on lines of their own)"
            )
        if class_name in images.unreadable:
            raise DataError(
                f"{images.root / class_name}: cannot be read ({images.unreadable[class_name]}); mend it, or let "
                "launch/prepare.py check leave the class out"
            )
        if count == 0 and images.places is not None:
            raise DataError(
                f"{images.root}: found no image of class {class_name!r}; launch/prepare.py check can leave it out"
            )
        if count == 0:
            raise DataError(
                f"{images.root / class_name}: found no images ({' '.join(IMG_EXTENSIONS)}); add some, or remove the "
                "folder from train/ and val/; launch/prepare.py check can leave it out"
            )
    return replace(images.only(kept), labels=labels, classes=classes, num_excluded=len(images.names) - len(kept))
