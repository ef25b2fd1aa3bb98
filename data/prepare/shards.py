"""Any data set packed into WebDataset shards, shuffled across its classes; data/shards.py describes and reads them."""

import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.batch import DataError, Split
from data.classes import numbered_classes
from data.files import FULL, cannot_write, reading, why_not
from data.images import SPLITS, ImageList, in_words, list_splits, require_schemes
from data.prepare.atomic import is_there, write_data_set
from data.prepare.progress import tracked
from data.prepare.smaller import Smaller
from data.prepare.tars import find_label_kind, read_classes, write_index
from data.shards import MANIFEST, listed_shards, read_manifest, read_shards, write_manifest

JPEG_START = b"\xff\xd8"


def prepare_shards(
    source: str | Path,
    path: str | Path,
    *,
    images_per_shard: int = 1000,
    seed: int = 0,
    exclude: str | Path = "",
    smaller: Smaller | None = None,
) -> bool:
    """Write PATH/{train,val}/*.tar with indices and manifests, from the data set at `source`.

    images_per_shard: 1000 photographs of ImageNet are about 110 MB. seed: of the order; equal ones give equal files.
    exclude: list of images to leave out; SOURCE/exclude.txt, if there is one, where empty. Images keep their bytes,
    but for training images that `smaller` makes smaller; accuracies are compared on validation's. One rank calls it.
    Returns whether it wrote: finished shards are left as they are. Raises DataError if the source is no data set or an
    image cannot be read, if something else is at `path`, the source included, or if the place cannot be written.
    """
    if images_per_shard < 1:
        raise DataError(f"images per shard: found {images_per_shard}, allowed: a whole number from 1")
    _require_place_for_shards(Path(source), Path(path))
    train, val = list_splits(source, exclude)
    require_schemes((), train, val)

    def write(root: Path) -> None:
        _write_split(train, "train", root, images_per_shard, seed, smaller)
        _write_split(val, "val", root, images_per_shard, seed)

    return write_data_set(path, write)


def index_shards(path: str | Path) -> bool:
    """Make a data set of WebDataset shards that others wrote: indices and manifests for PATH/{train,val}/*.tar.

    A sample is one image and its class, a number or a name, in a .cls, .json, .txt or .index file, the same in a whole
    split; what else it holds is left alone. The tar files are only read. A manifest that is there, as our own
    shards have one, is kept, and the indices that differ from its tar files are written anew. A split that is no shards
    is left alone. One rank calls it. Returns whether it wrote. Raises DataError if there are no shards, a tar file
    cannot be read, a sample has no image or class, a manifest does not fit its tar files, a link stands where a file is
    to be written, or the place cannot be written.
    """
    with reading(Path(path)):
        return _index_splits(Path(path))


def _index_splits(path: Path) -> bool:
    roots = [path / split for split in SPLITS]
    with_manifest = [root for root in roots if (root / MANIFEST).is_file()]
    tars_of = {root: sorted(root.glob("*.tar")) for root in roots if root not in with_manifest}
    others = [root for root, tars in tars_of.items() if not tars]
    bare = others if others == roots else [root for root in others if _is_empty(root)]
    if bare:
        raise DataError(
            f"{bare[0]}: found no tar files, expected those of {bare[0].name} there: move or link them, unpacked if "
            "they are compressed"
        )
    mended = [_mend_indices(root) for root in with_manifest]
    without_manifest = {root: tars for root, tars in tars_of.items() if tars}
    for root, tars in without_manifest.items():
        _index_split(root, tars)
    return any(mended) or bool(without_manifest)


def _mend_indices(root: Path) -> bool:
    """Write the indices anew that differ from the manifest's tar files; returns whether any did."""
    tars, written = listed_shards(root, read_manifest(root)), []
    for tar in tracked(tars, f"indexing {root.name}", len(tars)):
        with _named_in_errors(tar):
            written.append(write_index(tar))
    read_shards(root)  # raises if the manifest does not fit all the same
    return any(written)


def _index_split(root: Path, tars: list[Path]) -> None:
    """Write indices and the manifest."""
    found, label_kind = [], None
    for tar in tracked(tars, f"indexing {root.name}", len(tars)):
        with _named_in_errors(tar):
            write_index(tar)
            label_kind = label_kind or find_label_kind(tar)
            found += read_classes(tar, label_kind) if label_kind else []
    if not found:
        raise DataError(f"{root}: its {len(tars)} tar file(s) hold no images: move or link those that do there")
    classes, labels = numbered_classes(found)
    try:
        write_manifest(root, classes, labels, tars, with_labels=True)
    except OSError as error:
        raise cannot_write(root / MANIFEST, error) from error


def _is_empty(root: Path) -> bool:
    """Whether a split's folder is there and holds neither shards nor classes."""
    return root.is_dir() and not any(entry.is_dir() or entry.suffix == ".tar" for entry in root.iterdir())


@contextmanager
def _named_in_errors(tar: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise DataError(f"{tar}: cannot be read as a tar file ({error}): copy or make it again") from error
    except OSError as error:
        if error.errno in FULL:
            raise cannot_write(tar.with_suffix(".idx"), error) from error
        raise DataError(f"{tar}: cannot be indexed ({why_not(error)})") from error


def _require_place_for_shards(source: Path, path: Path) -> None:
    """DataError if the place is the source, or a data set of another kind, which must not pass for the shards."""
    if source.resolve() == path.resolve():
        raise DataError(f"{path}: is the source itself: choose another place for the shards")
    if is_there(path) and not all((path / split / MANIFEST).is_file() for split in SPLITS):
        raise DataError(
            f"{path}: holds a data set that is no shards, so it is kept: move it away, or choose another place"
        )


def _write_split(
    images: ImageList, split: Split, root: Path, images_per_shard: int, seed: int, smaller: Smaller | None = None
) -> None:
    (root / split).mkdir()
    order = np.random.Generator(np.random.PCG64([seed])).permutation(len(images.names)).tolist()
    parts = [order[first : first + images_per_shard] for first in range(0, len(order), images_per_shard)]
    tars = [root / split / f"{split}-{number:05d}.tar" for number in range(len(parts))]
    for tar, part in tracked(zip(tars, parts, strict=True), f"packing {split}", len(parts)):
        # GNU: names of any length in UTF-8. No header holds a time or a user, so equal images give equal files.
        with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as file:
            for index, content in zip(part, _contents(images, part, smaller), strict=True):
                _add_sample(file, images, index, content)
        write_index(tar)
    write_manifest(root / split, images.classes, images.labels, tars)


def _contents(images: ImageList, indices: Sequence[int], smaller: Smaller | None) -> Iterator[bytes]:
    if smaller is None:
        yield from (_read(images, index) for index in indices)
    else:
        with ThreadPoolExecutor() as pool:  # Pillow's work is outside of Python's lock
            yield from pool.map(lambda index: _made_smaller(images, index, smaller), indices)


def _made_smaller(images: ImageList, index: int, smaller: Smaller) -> bytes:
    content = _read(images, index)
    try:
        return smaller.of(content)
    except ValueError as error:
        raise DataError(
            f"{images.where(index)}: cannot be decoded ({error}): list what is broken with `launch/prepare.py check`"
        ) from error


def _read(images: ImageList, index: int) -> bytes:
    try:
        return images.read(index)
    except OSError as error:
        raise DataError(f"{images.where(index)}: cannot be read ({in_words(error)})") from error


def _add_sample(tar: tarfile.TarFile, images: ImageList, index: int, content: bytes) -> None:
    """LABEL-CLASS/NUMBER-NAME.jpg and .cls. Readers end a key at the first dot, and an index at the first blank."""
    label, name = int(images.labels[index]), Path(images.names[index])
    key = f"{label}-{_key_part(images.classes[label])}/{index:07d}-{_key_part(name.stem)}"
    extension = name.suffix.lower()[1:] or "jpg"  # a file list may name files without; decoders look at the content
    extension = "jpg" if extension == "jpeg" or content.startswith(JPEG_START) else extension
    for suffix, data in ((extension, content), ("cls", str(label).encode())):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _key_part(text: str) -> str:
    text = os.fsencode(text).decode("utf-8", errors="replace")
    return re.sub(r"[\s./]+", "_", text)
