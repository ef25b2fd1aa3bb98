"""Files that outlast a power cut, and files that others may have laid. Needs no torch.

What the kernel has taken survives a killed process, but not a power cut: for that a file must be synced, and so must
the directory that holds its name. A device or a pipe in place of a file would be read for ever, so none is.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT)


def open_regular(path: Path) -> BinaryIO:
    """The file for reading; OSError if it is none, or no regular one, which has an end."""
    # Without the flag, opening a named pipe waits for a writer for ever.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_bounded(path: Path, most: int) -> bytes:
    """The file's content; OSError if it cannot be read or is longer than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"found {size:,} bytes, at most {most:,} are read", str(path))
        return file.read(most)


def write_durably(path: Path, content: bytes) -> None:
    """Write the file whole or not at all; once this returns, no power cut takes it away. OSError if it cannot be."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def make_directory(path: Path) -> None:
    """Make the directory and those above it, for good. OSError as making does."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_directory(folder.parent)


def sync_directory(path: Path) -> None:
    """Make the names in the directory as lasting as their content."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def why_unwritten(error: Exception, path: Path) -> str:
    """Why a file could not be written, in words for the user: of a full disk, which directory is on it."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"no space left on {path.absolute().parent}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
