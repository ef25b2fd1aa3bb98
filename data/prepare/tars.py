"""WebDataset tar files from anywhere: where their files lie, which belong to a sample, and what its class is.

A tar file's headers are not trusted: sizes in them are bounded by what is there before anything is read by them.
"""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.batch import DataError
from data.files import open_regular, write_whole
from data.shards import INDEX_VERSION, LABEL_EXTENSIONS, IndexedFile, kind_of, samples_of

MAX_HEADER_BYTES = 1 << 16
LONG_NUMBER = re.compile(rb"[0-9]{1000}")
MAX_LABEL_BYTES = 1 << 20
LONGEST_CLASS_NAME = 255
JSON_KEYS = ("label", "cls", "class")
"""Where the class stands in a JSON object, the first that is there."""


class _Member(NamedTuple):
    """One file of a tar file."""

    name: str
    offset: int
    size: int


def write_index(tar: Path) -> bool:
    """Write TAR's index beside it: a line a sample, for each of its files extension, offset, size and name.

    Returns whether it wrote: it does nothing if that is what lies there. Raises tarfile.TarError if it is no whole tar
    file, OSError if it cannot be read, or the index not be written, and DataError if a link is in the index's place.
    """
    samples = [" ".join(map(_indexed, *zip(*sample, strict=True))) for sample in _samples(tar)]
    # A name in a tar file need not be UTF-8.
    content = os.fsencode("\n".join([f"{INDEX_VERSION} {len(samples)}", *samples]) + "\n")
    index = tar.with_suffix(".idx")
    if index.is_file() and index.stat().st_size == len(content) and index.read_bytes() == content:
        return False
    write_whole(index, content)
    return True


def _indexed(extension: str, member: _Member) -> str:
    # A blank ends a field.
    extension, name = (re.sub(r"\s", "_", text) for text in (extension, member.name))
    return f"{extension} {member.offset} {member.size} {name}"


def _samples(tar: Path) -> list[list[tuple[str, _Member]]]:
    """The files of every sample, each with its extension.

    The key that they have in common ends at the first dot of their names, as WebDataset has it. Where that leaves one
    sample with several labels of a kind, the keys themselves hold dots, and each ends at the last one.
    """
    by_first_dot: dict[str, list[tuple[str, _Member]]] = {}
    for member in _members(tar):
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if stem and extension:
            by_first_dot.setdefault(f"{folder}{slash}{stem}", []).append((extension, member))
    samples = []
    for files in by_first_dot.values():
        kinds = Counter(kind_of(extension) for extension, _ in files)
        if all(kinds[label] <= 1 for label in LABEL_EXTENSIONS):
            samples.append(files)
            continue
        by_last_dot: dict[str, list[tuple[str, _Member]]] = {}
        for _, member in files:
            stem, _, extension = member.name.rpartition(".")
            if extension:
                by_last_dot.setdefault(stem, []).append((extension, member))
        samples += by_last_dot.values()
    return samples


def _members(tar: Path) -> Iterator[_Member]:
    """The regular files in a tar file; tarfile.TarError if a header makes no sense."""
    with open_regular(tar) as file:
        length = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=_Headers(file), mode="r:") as members:
                for member in members:
                    if not member.isfile():
                        continue
                    if member.issparse():
                        raise tarfile.ReadError(f"{member.name} is stored with holes")
                    if not 0 <= member.size <= length - member.offset_data:
                        raise tarfile.ReadError(f"the header of {member.name} says {member.size:,} bytes")
                    yield _Member(member.name, member.offset_data, member.size)
        except (ValueError, LookupError, ArithmeticError, RecursionError) as error:  # tarfile's own at what it expects
            raise tarfile.ReadError(f"a header makes no sense: {error}") from error


class _Headers:
    """A tar file for `tarfile` to read headers from: forwards only, and no more at a time than a header has.

    By itself it follows a negative size backwards, for ever, reads as much as a header says at once, and takes time
    that grows with the square of a number's digits.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, place: int) -> None:
        if place < self._file.tell():
            raise tarfile.ReadError("the header of a file has a negative size")
        self._file.seek(place)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        content = self._file.read(size)
        if LONG_NUMBER.search(content):
            raise tarfile.ReadError("a header with a number of too many digits")
        return content


def find_label_kind(tar: Path) -> str | None:
    """Extension of the files that hold the classes, by the first sample in TAR's index; None if it has no sample.

    DataError if that sample has no such file. Of several the first of `LABEL_EXTENSIONS` counts; a JSON object only if
    it has one of `JSON_KEYS`.
    """
    sample = next(samples_of(tar.with_suffix(".idx")), None)
    if sample is None:
        return None
    held = [file for kind in LABEL_EXTENSIONS for file in sample if kind_of(file.extension) == kind]
    with tar.open("rb") as content:
        for file in held:
            if _class_in(content, file):
                return kind_of(file.extension)
    if held:
        raise DataError(f"{tar}: {_what_is_wrong(held[0])}")
    raise DataError(
        f"{tar}: the sample of {sample[-1].name} has no .{', .'.join(LABEL_EXTENSIONS)} file, one of which must "
        "hold its class"
    )


def read_classes(tar: Path, label_kind: str) -> list[str]:
    """The class of every sample in TAR's index, from its file with that extension. DataError where there is none."""
    classes = []
    with tar.open("rb") as content:
        for sample in samples_of(tar.with_suffix(".idx")):
            labels = [file for file in sample if kind_of(file.extension) == label_kind]
            if len(labels) != 1:
                found = f"{len(labels)} .{label_kind} files, expected one" if labels else f"no .{label_kind} file"
                raise DataError(f"{tar}: the sample of {sample[0].name} has {found}, which must hold its class")
            classes.append(_class_in(content, labels[0]))
            if not classes[-1]:
                raise DataError(f"{tar}: {_what_is_wrong(labels[0])}")
    return classes


def _class_in(tar: BinaryIO, file: IndexedFile) -> str:
    """What a label file says; empty if it is no class."""
    if file.size > MAX_LABEL_BYTES:
        return ""
    content = os.pread(tar.fileno(), file.size, file.offset)
    if kind_of(file.extension) == "json":
        return _class_in_json(content)
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() and len(text) <= LONGEST_CLASS_NAME else ""


def _class_in_json(content: bytes) -> str:
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    if isinstance(value, dict):
        value = next((value[key] for key in JSON_KEYS if key in value), None)
    is_class = type(value) is int or (isinstance(value, str) and value.isprintable())
    return str(value).strip() if is_class and len(str(value)) <= LONGEST_CLASS_NAME else ""


def _what_is_wrong(file: IndexedFile) -> str:
    kind = kind_of(file.extension)
    keys = f", in a JSON object under {', '.join(JSON_KEYS)}" if kind == "json" else ""
    return f"{file.name} ({file.size:,} bytes) holds no class: a line of up to {LONGEST_CLASS_NAME} characters{keys}"
