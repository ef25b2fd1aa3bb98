"""Hugging Face image sets on disk: Arrow files, as `datasets` saves them, or Parquet files named as on the Hub.

    FOLDER/train/data-00000-of-00002.arrow, FOLDER/train/state.json      what DatasetDict.save_to_disk(FOLDER) writes
    FOLDER/train-00000-of-00002.parquet, or FOLDER/data/train-...        what a download from the Hub has

These Arrow files are not compressed: the bytes of each image lie somewhere in a file as they are. Once their places are
known they are read like those in a shard, so order, resume and exclude list are the same, and no worker needs the
library. Parquet is unpacked to Arrow first, once, by `datasets` into its own cache.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.batch import DataError
from data.classes import numbered_classes
from data.shards import Places, forget_files

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Array, Buffer

PREFIX = "hf:"
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid", "test")}
"""What a split may be called; what counts first, first."""
STATE_FILE = "state.json"
"""`save_to_disk` leaves one in the folder of each split."""
EXPECTED = "a folder by DatasetDict.save_to_disk, or train-*.parquet and validation-*.parquet in it or in its data/"


def is_set(path: str | Path) -> bool:
    """Whether the path of a data set names one of these, as hf:FOLDER does."""
    return str(path).startswith(PREFIX)


def folder_of(path: str | Path) -> Path:
    return Path(str(path).removeprefix(PREFIX))


def has_split(folder: Path, split: str) -> bool:
    """Whether there is the split, `train` or `val`, by any of its names."""
    return bool(_find_split(folder, split))


def read_rows(folder: Path, split: str) -> tuple[list[str], np.ndarray, list[str], Places]:
    """Names, labels int64 (N,), classes and places of the images of a split, `train` or `val`.

    Images are in the column of type Image, or with `bytes` in each row; labels in the one of type ClassLabel, whose
    names are the classes, or else in a column `label` of numbers or words. Of several, those called `image` and
    `label` are taken. DataError if there is no such folder, split or column, if the split cannot be read, a row has no
    class, or `datasets` is not installed.
    """
    dataset = _load(folder, split)
    if len(dataset) == 0:
        raise _without_rows(folder, split)
    image_column, label_column = _image_column(dataset.features, folder), _label_column(dataset.features, folder)
    forget_files()
    files = [entry["filename"] for entry in dataset.cache_files]
    parts = [part for number, file in enumerate(files) for part in _parts_of(file, number, image_column, label_column)]
    shard, offset, size = (np.concatenate(arrays) for arrays in zip(*(part.places for part in parts), strict=True))
    if not size.any():
        raise DataError(f"{PREFIX}{folder}: the {len(size)} rows of {split} hold no bytes of images: save them along")
    labels = [label for part in parts for label in part.labels]
    classes, labels_N = _numbered(labels, getattr(dataset.features[label_column], "names", None), f"{folder}: {split}")
    names = [_row_name(row, path) for row, path in enumerate(path for part in parts for path in part.paths)]
    return names, labels_N, classes, Places(shards=files, shard=shard, offset=offset, size=size)


def _find_split(folder: Path, split: str) -> list[Path]:
    """The split's folder of Arrow files, or its Parquet files; empty where there is none."""
    for name in SPLIT_NAMES[split]:
        if (folder / name / STATE_FILE).is_file():
            return [folder / name]
        for place in (folder, folder / "data"):
            if files := sorted([*place.glob(f"{name}.parquet"), *place.glob(f"{name}-*.parquet")]):
                return files
    return []


def _load(folder: Path, split: str) -> "Dataset":
    if not folder.is_dir():
        raise DataError(f"{PREFIX}{folder}: there is no such folder; expected {EXPECTED}: set data.path")
    found = _find_split(folder, split)
    if not found:
        names = " or ".join(SPLIT_NAMES[split])
        raise DataError(f"{PREFIX}{folder}: there is no split called {names}; expected {EXPECTED}")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{PREFIX}{folder}: Hugging Face sets are read with the package datasets, which cannot be imported "
            f"({error}): pip install datasets"
        ) from error
    try:
        if found[0].is_dir():
            return datasets.load_from_disk(str(found[0]), keep_in_memory=False)
        files = {split: [str(file) for file in found]}
        return datasets.load_dataset("parquet", data_files=files, split=split, keep_in_memory=False)
    except IndexError as error:  # as datasets reads a folder whose table has no part
        raise _without_rows(folder, split) from error
    except Exception as error:  # of many types; what unpacking meets is behind theirs
        why = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise DataError(f"{found[0]}: cannot be read as {split} of a Hugging Face set ({why})") from error


def _without_rows(folder: Path, split: str) -> DataError:
    return DataError(f"{PREFIX}{folder}: {split} has no rows: save it with its images, or take it away")


def _image_column(features: Mapping[str, Any], folder: Path) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == "Image" or _has_bytes(feature)]
    return _only(found, "image", "of images (type Image, or with `bytes` in each row)", features, folder)


def _has_bytes(feature: Any) -> bool:
    return isinstance(feature, Mapping) and getattr(feature.get("bytes"), "dtype", "") in ("binary", "large_binary")


def _label_column(features: Mapping[str, Any], folder: Path) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    plain = getattr(features.get("label"), "dtype", "")
    if not found and (plain.startswith(("int", "uint")) or plain in ("string", "large_string")):
        found = ["label"]
    return _only(found, "label", "of labels (type ClassLabel, or `label` of numbers or words)", features, folder)


def _only(found: list[str], usual: str, what: str, features: Mapping[str, Any], folder: Path) -> str:
    """The one column found, or the one with the usual name; DataError if there is none."""
    if len(found) == 1 or usual in found:
        return usual if usual in found else found[0]
    number = f"{len(found)} columns ({', '.join(found)})" if found else f"no column among {', '.join(features)}"
    raise DataError(f"{PREFIX}{folder}: found {number} {what}; expected one, or one called {usual!r}: rename it")


class _Part(NamedTuple):
    """Some rows, one after the other."""

    paths: list[str | None]
    """What the images' files were called, where that was kept."""
    labels: list[Any]
    places: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Number of the file, offset and size in bytes, as in `Places`."""


def _parts_of(file: str, number: int, image_column: str, label_column: str) -> Iterator[_Part]:
    """The rows of an Arrow file. The images themselves are not read."""
    import pyarrow

    whole = pyarrow.memory_map(file).read_buffer()
    for batch in pyarrow.ipc.open_stream(whole):
        images = batch[image_column]
        offset, size = _places_in(images.field("bytes"), whole)
        paths = images.field("path").to_pylist() if images.type.get_field_index("path") >= 0 else [None] * len(images)
        yield _Part(paths, batch[label_column].to_pylist(), (np.full(len(images), number), offset, size))


def _places_in(array: "Array", whole: "Buffer") -> tuple[np.ndarray, np.ndarray]:
    """Offset in the file and size of each value of a column of bytes, int64 (n,); one that is missing has size 0."""
    _, ends, content = array.buffers()
    width = 8 if str(array.type).startswith("large_") else 4
    ends_N = np.frombuffer(ends, dtype=f"<i{width}", count=len(array) + 1, offset=width * array.offset).astype(np.int64)
    first = content.address - whole.address if content else 0
    if not 0 <= first <= whole.size:
        raise DataError("the Arrow files are compressed, which datasets does not do: save the set with it")
    return first + ends_N[:-1], np.diff(ends_N)


def _numbered(labels: list[Any], names: list[str] | None, where: str) -> tuple[list[str], np.ndarray]:
    """The classes and the label int64 (N,) of each row. names: of a ClassLabel, whose labels are numbers already."""
    for row, label in enumerate(labels):
        if label is None or (names and not 0 <= label < len(names)):  # datasets marks what has no class by -1
            raise DataError(f"{PREFIX}{where}: row {row} has no class (its label is {label!r}): leave such rows out")
    return (list(names), np.array(labels, dtype=np.int64)) if names else numbered_classes([*map(str, labels)])


def _row_name(row: int, path: str | None) -> str:
    """What a row is called in messages and exclude lists: its number, and the image's own name where that was kept."""
    return f"row {row}, {PurePosixPath(path).name}" if path else f"row {row}"
