"""torch.save's zip archive with a checksum as its comment, written, and read without executing anything in it.

`unzip -z last.pt` shows the checksum: a file of its own could be lost or outlive its checkpoint. It is verified before
anything is unpickled. What others wrote has none.

A small file can ask for any amount of memory, so what it may take is bounded by its size.
"""

import errno
import hashlib
import os
import re
import resource
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from train.errors import TrainError
from train.files import open_regular

COMMENT = re.compile(rb"sha256:([0-9a-f]{64})")
COMMENT_BYTES = 71
ZIP_END = re.compile(rb"PK\x05\x06.{18}", re.DOTALL)
"""The end of an archive without a comment."""
ZIP_END_BYTES = 22
MEMORY_BESIDE = 1 << 30
"""Bytes that reading may take whatever the size: what threads and allocators reserve."""


class CheckpointError(TrainError):
    """A checkpoint that cannot be read or does not belong here."""


class UnreadableError(CheckpointError):
    """The file may be sound: the system does not let it be read. Nothing follows about its content."""


def write_archive(file: BinaryIO, content: Any) -> None:
    """The archive, and behind it its comment: the checksum of the archive as it was without. OSError if it cannot."""
    hashing = _Hashing(file)
    try:
        torch.save(content, hashing)
    except RuntimeError:  # in which torch hides what went wrong
        if hashing.error is None:
            raise
        raise hashing.error from None
    comment = b"sha256:" + hashing.digest.hexdigest().encode()
    file.seek(-2, os.SEEK_END)  # a zip archive ends with its comment's length, here still 0, and the comment
    file.write(len(comment).to_bytes(2, "little") + comment)


def load_archive(path: Path, otherwise: str) -> tuple[Any, bool]:
    """What the archive holds, tensors on the CPU and plain data only, and whether a checksum vouches for it.

    otherwise: what is said of a file that is none. Raises UnreadableError where the system refuses, CheckpointError for
    any other file that cannot be read.
    """
    return _load(path, otherwise, lambda file: _unpickled(file, stand_ins=[]))


def load_foreign_archive(path: Path) -> tuple[Any, list[str]]:
    """What others' archive holds, and the names of the classes and functions in it that this program does not know.

    Of these nothing is imported or run: a `_Nothing` stands where they made something. Raises as `load_archive` does.
    """
    strange: list[str] = []

    def read(file: BinaryIO) -> Any:
        if zipfile.is_zipfile(file):
            file.seek(0)
            strange.extend(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)))
        file.seek(0)
        return _unpickled(file, [(_NoDict if name.lower().endswith("dict") else _Nothing, name) for name in strange])

    content, _ = _load(path, "is no file of weights", read)
    return content, strange


def _unpickled(file: BinaryIO, stand_ins: list[tuple[type, str]]) -> Any:
    """What the file holds. stand_ins: what is taken in place of the classes and functions of these names."""
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(file, map_location="cpu", weights_only=True)


class _Nothing:
    """Stands for an object of a class that is not known here; takes what it is made of, and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Nothing":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _NoDict:
    """Stands for a class of dictionaries, which are filled after they are made."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict:
        return OrderedDict()


def _load(path: Path, otherwise: str, read: Callable[[BinaryIO], Any]) -> tuple[Any, bool]:
    try:
        with open_regular(path) as file:
            vouched = _verify(file, path)
            size = os.fstat(file.fileno()).st_size
            _refuse_bomb(file, size, path)
            file.seek(0)
            with _bounded_memory(3 * size + MEMORY_BESIDE):
                return read(file), vouched
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"no file at {path}") from error
    except OSError as error:
        if error.filename is None and error.errno in (
            None,
            errno.EINVAL,
        ):  # a place in the file that a damaged header named
            raise CheckpointError(f"{path} {otherwise}; nothing in it was run") from error
        raise UnreadableError(f"cannot read {path}: {error.strerror or error}{_hint(path)}") from error
    except Exception as error:  # torch.load raises many types for a file that is damaged or not its own
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UnreadableError(f"{path} asks for more memory than there is, or than its size can need") from error
        raise CheckpointError(f"{path} {otherwise}; nothing in it was run") from error


def _verify(file: BinaryIO, path: Path) -> bool:
    """Whether the file has a checksum, which is then the right one. CheckpointError for a wrong or broken one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - COMMENT_BYTES))
    end = file.read()
    stored = COMMENT.fullmatch(end)
    file.seek(0)
    if stored is None:
        # Where bits of the comment have changed, its length is still there, and the end is not that of an archive.
        if not zipfile.is_zipfile(file) or (ZIP_END.fullmatch(end[-ZIP_END_BYTES:]) and end.endswith(b"\0\0")):
            return False
        raise CheckpointError(f"{path} is damaged: what stands in place of its checksum is none")
    file.seek(0)
    digest, left = hashlib.sha256(), size - COMMENT_BYTES - 2
    while left > 0 and (block := file.read(min(left, 1 << 22))):
        digest.update(block)
        left -= len(block)
    digest.update(b"\0\0")
    if digest.hexdigest().encode() != stored[1]:
        raise CheckpointError(f"{path} is damaged: its content does not have the checksum that it was written with")
    return True


def _refuse_bomb(file: BinaryIO, size: int, path: Path) -> None:
    """CheckpointError for an archive that unpacks to more than it is. torch.save packs nothing."""
    file.seek(0)
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path} is no file of torch.save: what is in it is packed, or larger than the file")


@contextmanager
def _bounded_memory(more: int) -> Iterator[None]:
    """Inside, this process may take `more` bytes of address space beside what it has, where the system can count."""
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (taken + more, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _hint(path: Path) -> str:
    """What to give in place of a run directory."""
    with suppress(OSError):
        if (path / "log.jsonl").exists() and (path / "last.pt").exists():
            best = f"{path / 'best.pt'} (the best epoch) or " if (path / "best.pt").exists() else ""
            return f"; it is a run directory, give {best}{path / 'last.pt'} (the last one)"
    return ""


class _Hashing:
    """A file to write to that keeps the checksum of what it was given, and the error that ended it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
