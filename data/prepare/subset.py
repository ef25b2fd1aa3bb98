"""Fewer images of a data set, for experiments that have to end tonight."""

import os
import shutil
from pathlib import Path

from data.batch import DataError
from data.images import ImageList, list_splits
from data.prepare.atomic import write_data_set


def prepare_subset(source: str | Path, path: str | Path, train: int, val: int) -> bool:
    """Write an image folder with so many images of each split, classes in proportion, always the same ones.

    Files are hard links where the file system allows, else copies. A finished set at `path` is left as it is; returns
    whether one was written. Raises DataError for a source that is no image folder or has fewer images, and as
    `write_data_set` does.
    """
    splits = dict(zip(("train", "val"), list_splits(source), strict=True))
    counts = {"train": train, "val": val}
    for split, images in splits.items():
        if images.places is not None or images.root != Path(source) / split:
            raise DataError(f"{source}: found file lists, shards or a Hugging Face set, allowed: an image folder")
        if not len(images.classes) <= counts[split] <= len(images.names):
            allowed = f"{len(images.classes):,} (one a class) to {len(images.names):,}"
            raise DataError(f"{source}: found {counts[split]:,} images of {split} asked for, allowed: {allowed}")
    return write_data_set(path, lambda root: [_link(splits[split], counts[split], root / split) for split in splits])


def _link(images: ImageList, count: int, folder: Path) -> None:
    """Evenly over the list, in which a class's images stand together."""
    for name in images.classes:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        name = images.names[number * len(images.names) // count]
        try:
            os.link(images.root / name, folder / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(images.root / name, folder / name)
