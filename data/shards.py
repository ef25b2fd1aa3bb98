"""Shards: a split as WebDataset tar files, each with an index, and a manifest that says what must be there.

    train/train-00000.tar   3-ant/0000012-name.jpg and 3-ant/0000012-name.cls, sample by sample
    train/train-00000.idx   where they lie in it; the format of DALI's wds2idx
    train/manifest.json     the classes, and the images and bytes of every shard

Any WebDataset reader takes them. Ours reads single images by the index instead of streaming whole files: so training
has the exact order, the resume in the middle of an epoch and the exclude list of any other data set. The order keeps
reads close together (data/sharding.py), and the kernel is told of them ahead.
"""

import json
import os
import tarfile
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.batch import DataError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
MANIFEST_ENTRIES = {
    "classes": {"name": str, "images": int},
    "shards": {"file": str, "images": int, "bytes": int},
}
INDEX_VERSION = "v1.2"
LABEL_EXTENSION = "cls"
OPEN_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class TarPlaces:
    """Where images lie in shards."""

    shards: list[str]
    """Paths of the tar files."""
    shard: np.ndarray
    """int64 (N,), index into `shards`, ascending."""
    offset: np.ndarray
    """int64 (N,), bytes from the beginning of the tar file."""
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

    def only(self, kept: list[int]) -> "TarPlaces":
        return replace(self, shard=self.shard[kept], offset=self.offset[kept], size=self.size[kept])


def read_shards(root: Path) -> tuple[list[str], np.ndarray, list[str], TarPlaces]:
    """Names, labels int64 (N,), classes and places of the images in ROOT's shards.

    DataError if a shard or its index is missing, cut short, or not what the manifest says.
    """
    manifest = _read_manifest(root)
    classes = [entry["name"] for entry in manifest["classes"]]
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    for number, entry in enumerate(manifest["shards"]):
        tar = root / entry["file"]
        found = tar.stat().st_size if tar.is_file() else None
        if found != entry["bytes"]:
            size = "no such file" if found is None else f"{found:,} bytes"
            raise DataError(f"{tar}: found {size}, {MANIFEST} says {entry['bytes']:,} bytes: copy or make it again")
        members = read_index(tar.with_suffix(".idx"))
        if len(members) != entry["images"]:
            raise DataError(f"{tar}: its index has {len(members)} images, {MANIFEST} says {entry['images']}")
        names += [name for name, _, _ in members]
        places += [(number, offset, size) for _, offset, size in members]
    prefixes = [name.split("-", 1)[0] for name in names]
    labels = np.array([int(prefix) if prefix.isdecimal() else len(classes) for prefix in prefixes], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    if counts != [entry["images"] for entry in manifest["classes"]]:
        raise DataError(f"{root}: the images of each class are not as many as {MANIFEST} says: make the shards again")
    shard, offset, size = np.array(places, dtype=np.int64).reshape(-1, 3).T
    shards = [str(root / entry["file"]) for entry in manifest["shards"]]
    return names, labels, classes, TarPlaces(shards=shards, shard=shard, offset=offset, size=size)


def write_manifest(root: Path, classes: list[str], labels: np.ndarray, tars: list[Path]) -> None:
    """Write ROOT/manifest.json about finished shards and their indices."""
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    content = {
        "format": MANIFEST_FORMAT,
        "images": len(labels),
        "classes": [{"name": name, "images": count} for name, count in zip(classes, counts, strict=True)],
        "shards": [
            {"file": tar.name, "images": len(read_index(tar.with_suffix(".idx"))), "bytes": tar.stat().st_size}
            for tar in tars
        ],
    }
    # ASCII: a class folder's name need not be UTF-8, and its bytes come back from escapes only.
    (root / MANIFEST).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def write_index(tar: Path) -> None:
    """Write TAR's index beside it: a line a sample, for each of its files extension, offset, size and name."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(tar, "r:") as members:
        for member in members:
            key, extension = member.name.rsplit(".", 1)
            samples.setdefault(key, []).append(f"{extension} {member.offset_data} {member.size} {member.name}")
    lines = [f"{INDEX_VERSION} {len(samples)}", *(" ".join(files) for files in samples.values())]
    tar.with_suffix(".idx").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_index(file: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of every image; DataError if it is no such index or is cut short."""
    try:
        header, *lines = file.read_text(encoding="utf-8").splitlines()
        version, count = header.split()
        images = [_image_of(line.split(" ")) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as an index of a shard ({error}): make the shards again") from error
    if version != INDEX_VERSION or len(images) != int(count):
        raise DataError(
            f"{file}: found {version} with {len(images)} of {count} samples, expected {INDEX_VERSION} with all of them"
        )
    return images


def _image_of(fields: list[str]) -> tuple[str, int, int]:
    """The file of a sample that is not its label."""
    files = [fields[start : start + 4] for start in range(0, len(fields), 4)]
    [(_, offset, size, name)] = [file for file in files if file[0] != LABEL_EXTENSION]
    return name, int(offset), int(size)


def _read_manifest(root: Path) -> dict[str, Any]:
    file = root / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}): make the shards again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != MANIFEST_FORMAT:
        raise DataError(f"{file}: found format {found!r}, allowed: {MANIFEST_FORMAT}")
    for key, types in MANIFEST_ENTRIES.items():
        entries = manifest.get(key)
        if not isinstance(entries, list) or not all(_is_entry(entry, types) for entry in entries):
            raise DataError(f"{file}: {key!r} is no list with {', '.join(types)} in each entry: make the shards again")
    return manifest


def _is_entry(entry: Any, types: dict[str, type]) -> bool:
    return isinstance(entry, dict) and all(type(entry.get(name)) is expected for name, expected in types.items())


class _OpenFile:
    """A descriptor that is closed when nobody uses it any more, as when it falls out of the cache."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=OPEN_SHARDS)
def _opened(path: str) -> _OpenFile:
    return _OpenFile(os.open(path, os.O_RDONLY))
