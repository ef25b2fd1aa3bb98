"""Shards: a split as WebDataset tar files, each with an index, and a manifest that says what must be there.

    train/train-00000.tar   3-ant/0000012-name.jpg and 3-ant/0000012-name.cls, sample by sample
    train/train-00000.idx   where they lie in it; the format of DALI's wds2idx
    train/manifest.json     the classes, and the images and bytes of every shard

Shards that others wrote keep their names; their manifest holds the label of every image, too.

Any WebDataset reader takes them. Ours reads single images by the index instead of streaming whole files: so training
has the exact order, the resume in the middle of an epoch and the exclude list of any other data set. The order keeps
reads close together (data/sharding.py), and the kernel is told of them ahead.
"""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.batch import DataError
from data.classes import MAX_DIGITS
from data.files import MAX_IMAGE_BYTES, lines_of, read_bounded, why_not, write_whole

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MANIFEST_ENTRIES = {
    "classes": {"name": str, "images": int},
    "shards": {"file": str, "images": int, "bytes": int},
}
INDEX_VERSION = "v1.2"
LABEL_EXTENSIONS = ("cls", "json", "txt", "index")
"""Of the files that may hold a sample's class: what counts first, first. Ours have .cls files."""
MAX_MANIFEST_BYTES = 1 << 28
OPEN_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where images lie within larger files: shards, or the Arrow files of a Hugging Face set (data/hf.py)."""

    shards: list[str]
    """Paths of the files."""
    shard: np.ndarray
    """int64 (N,), index into `shards`; ascending where training deals the images out."""
    offset: np.ndarray
    """int64 (N,), bytes from the beginning of the file."""
    size: np.ndarray
    """int64 (N,), bytes."""

    @cached_property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(np.bincount(self.shard, minlength=len(self.shards)).tolist())

    def shard_path(self, index: int) -> str:
        return self.shards[self.shard[index]]

    def read(self, index: int) -> bytes:
        """One image's bytes; OSError if the shard cannot be read or ends before them."""
        size = int(self.size[index])
        if size > MAX_IMAGE_BYTES:
            raise OSError(errno.EFBIG, f"found {size:,} bytes, at most {MAX_IMAGE_BYTES:,} are read")
        # Held by name while it is read: another thread may push it out of the cache, which closes it once unused.
        file = _opened(self.shard_path(index))
        content = os.pread(file.descriptor, size, int(self.offset[index]))
        if len(content) < size:
            raise OSError(f"the shard ends {size - len(content)} bytes before the image does")
        return content

    def will_read(self, indices: np.ndarray) -> None:
        """Let the kernel fetch these images while others are decoded."""
        if hasattr(os, "posix_fadvise"):
            for index in indices.tolist():
                file, offset, size = _opened(self.shard_path(index)), int(self.offset[index]), int(self.size[index])
                os.posix_fadvise(file.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def only(self, kept: list[int]) -> "Places":
        return replace(self, shard=self.shard[kept], offset=self.offset[kept], size=self.size[kept])


def read_shards(root: Path) -> tuple[list[str], np.ndarray, list[str], Places]:
    """Names, labels int64 (N,), classes and places of the images in ROOT's shards.

    DataError if a shard or its index is missing, cut short, or not what the manifest says, or if it does not list one.
    """
    manifest = read_manifest(root)
    forget_files()
    tars = listed_shards(root, manifest)
    classes = [entry["name"] for entry in manifest["classes"]]
    names: list[str] = []
    labels: list[int] = []
    places: list[tuple[int, int, int]] = []
    for number, (tar, entry) in enumerate(zip(tars, manifest["shards"], strict=True)):
        images = read_index(tar.with_suffix(".idx"))
        if len(images) != entry["images"]:
            raise DataError(
                f"{tar}: its index has {len(images)} images, {MANIFEST} says {entry['images']}: {_remedy(root)}"
            )
        if any(not 0 <= offset <= offset + size <= entry["bytes"] for _, offset, size in images):
            raise DataError(f"{tar}: its index names places outside of it: {_remedy(root)}")
        if "labels" in entry:
            names += [f"{tar.name}/{name}" for name, _, _ in images]  # another shard may have the same ones
            labels += _checked_labels(entry["labels"], len(images), len(classes), root)
        else:
            names += [name for name, _, _ in images]
            labels += [_label_in(name, len(classes)) for name, _, _ in images]
        places += [(number, offset, size) for _, offset, size in images]
    labels_N = np.array(labels, dtype=np.int64)
    counts = np.bincount(labels_N, minlength=len(classes)).tolist()
    if counts != [entry["images"] for entry in manifest["classes"]]:
        raise DataError(f"{root}: the images of each class are not as many as {MANIFEST} says: {_remedy(root)}")
    shard, offset, size = np.array(places, dtype=np.int64).reshape(-1, 3).T
    return names, labels_N, classes, Places(shards=[*map(str, tars)], shard=shard, offset=offset, size=size)


def read_manifest(root: Path) -> dict[str, Any]:
    """ROOT's manifest; DataError if it cannot be read or is not as `write_manifest` writes it."""
    file = root / MANIFEST
    again = f"make the shards again, or, if others made them, remove it and run launch/prepare.py index {root.parent}"
    try:
        manifest = json.loads(read_bounded(file, MAX_MANIFEST_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({why_not(error)}): {again}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != MANIFEST_FORMAT:
        raise DataError(f"{file}: found format {found!r}, allowed: {MANIFEST_FORMAT}")
    for key, types in MANIFEST_ENTRIES.items():
        entries = manifest.get(key)
        if not isinstance(entries, list) or not all(_is_entry(entry, types) for entry in entries):
            raise DataError(f"{file}: {key!r} is no list with {', '.join(types)} in each entry: {again}")
    names = [entry["name"] for entry in manifest["classes"]]
    if len(set(names)) < len(names):
        raise DataError(f"{file}: two of the 'classes' have one name: {again}")
    files = [entry["file"] for entry in manifest["shards"]]
    outside = [name for name in files if Path(name).name != name or Path(name).suffix != ".tar" or "\0" in name]
    if outside or len(set(files)) < len(files):
        wrong = (
            f"{outside[0]!r} is no name of a tar file in its folder" if outside else "two of the 'shards' are one file"
        )
        raise DataError(f"{file}: {wrong}: {again}")
    return manifest


def listed_shards(root: Path, manifest: dict[str, Any]) -> list[Path]:
    """The tar files of ROOT's manifest, in its order.

    DataError if one is missing or of another length than the manifest says, or if there is one that it does not list.
    """
    # Our own shards' classes have their names in the manifest alone: they would be mere numbers in another one.
    others_made_them = any("labels" in entry for entry in manifest["shards"])
    anew = f", or remove {MANIFEST} and run launch/prepare.py index {root.parent}" if others_made_them else ""
    unlisted = sorted({tar.name for tar in root.glob("*.tar")} - {entry["file"] for entry in manifest["shards"]})
    if unlisted:
        raise DataError(f"{root / unlisted[0]}: {MANIFEST} does not list it: move it away{anew}")
    tars = [root / entry["file"] for entry in manifest["shards"]]
    for tar, entry in zip(tars, manifest["shards"], strict=True):
        found = tar.stat().st_size if tar.is_file() else None
        if found != entry["bytes"]:
            size = "no such file" if found is None else f"{found:,} bytes"
            raise DataError(
                f"{tar}: found {size}, {MANIFEST} says {entry['bytes']:,} bytes: copy or make it again{anew}"
            )
    return tars


def _remedy(root: Path) -> str:
    """What to do where an index or a manifest does not fit its tar files."""
    return (
        f"launch/prepare.py index {root.parent} writes indices anew; if it says the same, make the shards again, or, "
        f"if others made them, remove {MANIFEST} first"
    )


def write_manifest(
    root: Path, classes: list[str], labels: np.ndarray, tars: list[Path], *, with_labels: bool = False
) -> None:
    """Write ROOT/manifest.json about finished shards and their indices.

    labels: int64 (N,), in the order of the shards if the manifest is to hold them, which it must where names do not.
    """
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    shards, first = [], 0
    for tar in tars:
        images = len(read_index(tar.with_suffix(".idx")))
        entry = {"file": tar.name, "images": images, "bytes": tar.stat().st_size}
        if with_labels:
            entry["labels"] = labels[first : first + images].tolist()
        shards.append(entry)
        first += images
    content = {
        "format": MANIFEST_FORMAT,
        "images": len(labels),
        "classes": [{"name": name, "images": count} for name, count in zip(classes, counts, strict=True)],
        "shards": shards,
    }
    # ASCII: a class folder's name need not be UTF-8, and its bytes come back from escapes only.
    text = json.dumps(content, indent=None if with_labels else 1, ensure_ascii=True) + "\n"
    write_whole(root / MANIFEST, text.encode())


class IndexedFile(NamedTuple):
    """One file of a sample, as an index has it."""

    extension: str
    offset: int
    """Bytes from the beginning of the tar file."""
    size: int
    """Bytes."""
    name: str


def kind_of(extension: str) -> str:
    """What follows the last dot, in small letters: what a file is."""
    return extension.rpartition(".")[2].lower()


def read_index(file: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of every image; DataError if it is no such index, or a sample has no image or several."""
    images = []
    for sample in samples_of(file):  # a million images: nothing more is kept of each
        image = _image_of(sample, file)
        images.append((image.name, image.offset, image.size))
    return images


def samples_of(file: Path) -> Iterator[list[IndexedFile]]:
    """The files of each sample of an index; DataError, at its end at the latest, if it is none or not whole."""
    found = 0
    try:
        lines = lines_of(file)
        version, count = next(lines, b"").decode().split()
        for line in lines:
            found += 1
            fields = os.fsdecode(line).split(" ")
            if len(fields) % 4:
                raise ValueError(f"found {len(fields)} fields in a line, expected 4 for each file")
            quarters = [fields[start : start + 4] for start in range(0, len(fields), 4)]
            yield [IndexedFile(kind, int(offset), int(size), name) for kind, offset, size, name in quarters]
        if (version, int(count)) != (INDEX_VERSION, found):
            raise ValueError(f"{version} with {found} of {count} samples, expected {INDEX_VERSION} with all of them")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read as an index of a shard ({why_not(error)}): "
            f"launch/prepare.py index {file.parent.parent} writes it anew"
        ) from error


def _image_of(sample: list[IndexedFile], index: Path) -> IndexedFile:
    """The file of a sample that is none of its labels; of several, such as masks, the one named as an image."""
    images = [file for file in sample if kind_of(file.extension) not in LABEL_EXTENSIONS]
    if len(images) > 1:
        images = [file for file in images if f".{kind_of(file.extension)}" in IMG_EXTENSIONS]
    if len(images) != 1:
        raise DataError(f"{index}: found {len(images)} images in the sample of {sample[0].name}, expected one")
    return images[0]


def _checked_labels(labels: Any, num_images: int, num_classes: int, root: Path) -> list[int]:
    """A shard's labels as the manifest has them; DataError if they are not its images' labels."""
    fit = isinstance(labels, list) and all(type(label) is int and 0 <= label < num_classes for label in labels)
    if not fit or len(labels) != num_images:
        raise DataError(
            f"{root / MANIFEST}: 'labels' are not a whole number under {num_classes} for each image: remove it and "
            f"run launch/prepare.py index {root.parent}"
        )
    return labels


def _label_in(name: str, num_classes: int) -> int:
    """The label at the beginning of a name of our own; `num_classes`, which no image can have, where there is none."""
    prefix = name.split("-", 1)[0]
    return min(int(prefix), num_classes) if prefix.isdecimal() and len(prefix) <= MAX_DIGITS else num_classes


def _is_entry(entry: Any, types: dict[str, type]) -> bool:
    return isinstance(entry, dict) and all(type(entry.get(name)) is expected for name, expected in types.items())


def forget_files() -> None:
    """Let what is read next be opened anew: other files may lie there by now."""
    _opened.cache_clear()


class _OpenFile:
    """A descriptor that is closed when nobody uses it any more, as when it falls out of the cache."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=OPEN_SHARDS)
def _opened(path: str) -> _OpenFile:
    return _OpenFile(os.open(path, os.O_RDONLY))
