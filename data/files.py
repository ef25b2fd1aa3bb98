"""Files that others may have laid: none but regular ones are read, and no link is written through.

A device or a pipe in place of a file would be read for ever, and what a link in place of a file of ours points to would
be overwritten.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.batch import DataError

LONGEST_LINE = 1 << 16
"""Bytes. A file that is one long line, as one of zeros, ends in an error and not in the memory."""
MAX_IMAGE_BYTES = 1 << 28
"""256 MiB: no photograph has more, and sixteen images are read at a time."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def open_regular(path: str | Path) -> BinaryIO:
    """The file for reading; OSError if it is none, or no regular one, which has an end."""
    # Without the flag, opening a named pipe waits for a writer for ever.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_bounded(path: str | Path, most: int) -> bytes:
    """The file's content; OSError if it cannot be read or is longer than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"found {size:,} bytes, at most {most:,} are read", str(path))
        return file.read(most)


def lines_of(path: str | Path) -> Iterator[bytes]:
    """The file's lines, without their ends, one after the other. OSError if they cannot be read."""
    with open_regular(path) as file:
        while line := file.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                raise OSError(errno.EFBIG, f"a line is longer than {LONGEST_LINE:,} bytes", str(path))
            yield line.removesuffix(b"\n").removesuffix(b"\r")


def why_not(error: Exception) -> str:
    """What the operating system says, without the name, which the caller tells; else the error's own words."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the operating system says, inside, of a place that cannot be looked at into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read ({why_not(error)})") from error


def refuse_link(path: Path) -> None:
    """DataError if a link stands at a name that is about to be made, replaced or removed."""
    if path.is_symlink():
        raise DataError(f"{path}: is a link, to {path.readlink()}, and is not followed: remove it")


def write_whole(file: Path, content: bytes) -> None:
    """Write the file in one step, so that an interrupted attempt leaves the one of before. OSError as writing does.

    DataError if the file, or the name that it has until it is whole, is a link.
    """
    unfinished = file.with_name(f".{file.name}.part")
    for path in (file, unfinished):
        refuse_link(path)
    # Never the file that an earlier attempt left: it may have another name elsewhere, or be a pipe by now.
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as target:
            target.write(content)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)  # a full disk leaves half of it


def cannot_write(path: Path, error: OSError) -> DataError:
    """The error to raise where a file or folder cannot be written."""
    if error.errno in FULL:
        return DataError(f"{path}: no space left on {path.absolute().parent}: make room, or choose another place")
    return DataError(f"{path}: cannot be written ({why_not(error)}): choose another place")
