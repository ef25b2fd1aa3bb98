"""Data sets appear at their place finished or not at all, whatever interrupts their preparation."""

import fcntl
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.batch import DataError
from data.files import FULL, cannot_write, refuse_link

LOCK = ".lock"
RESUMABLE = ".resumable"
"""Marks what a maker that resumes left, so that it does not take another one's remains for its own."""


def write_data_set(path: str | Path, write: Callable[[Path], None], *, resumes: bool = False) -> bool:
    """Let `write` fill a folder with train/ and val/, then rename it to `path` in one step.

    The folder is `.NAME.preparing` beside `path`. It is empty at the beginning; where `write` resumes, which one maker
    does, it holds what an interrupted or failed attempt of that one left there. Of several processes that prepare the
    same set one does, the others wait. Returns whether this one did: it does nothing if `path` holds a finished set.
    Raises DataError if something else is at `path`, a link is in the way, the place cannot be written, as on a full
    disk, or what `write` reads cannot be read.
    """
    path = Path(path)
    if is_there(path):
        return False
    # Beside the target, as a rename is atomic within one file system only.
    unfinished = path.parent / f".{path.name}.preparing"
    try:
        with _alone_in(unfinished):
            if is_there(path):  # another process was quicker
                return False
            marker = unfinished / RESUMABLE
            if not (resumes and marker.is_file() and not marker.is_symlink()):
                _empty(unfinished)  # a killed process cannot clean up
            try:
                if resumes:
                    marker.touch()
                write(unfinished)
                unfinished.rename(path)
                (path / RESUMABLE).unlink(missing_ok=True)
                (path / LOCK).unlink()  # not before: another process would take the folder for its own
            finally:
                if not (resumes and _entries(unfinished) - {RESUMABLE}):
                    _empty(unfinished)
    except OSError as error:
        raise _as_data_error(error, path, unfinished) from error
    return True


def is_there(path: Path) -> bool:
    """Whether a finished set is at `path`; DataError if something else is."""
    try:
        exists, finished = path.exists(), _is_finished(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be looked at ({error.strerror}): choose another place") from error
    if not exists:
        refuse_link(path)
    if exists and not finished:
        raise DataError(
            f"{path}: exists, but train/ or val/ is missing or empty, so it is not overwritten: "
            "move it away, or choose another place"
        )
    return exists


def _is_finished(path: Path) -> bool:
    return all((path / split).is_dir() and any((path / split).iterdir()) for split in ("train", "val"))


def _as_data_error(error: OSError, path: Path, unfinished: Path) -> DataError:
    """Blames the place, unless the error names a file elsewhere, which can only have been read."""
    place, named = unfinished.absolute(), error.filename
    if isinstance(named, str | bytes) and error.errno not in FULL:
        file = Path(os.fsdecode(named)).absolute()
        if not (file.is_relative_to(place) or place.is_relative_to(file)):
            return DataError(f"{file}: cannot be read ({error.strerror})")
    return cannot_write(path, error)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it; what is empty at the end is removed."""
    lock = None
    while lock is None:
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        refuse_link(folder / LOCK)
        lock = _locked(folder / LOCK)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        with suppress(OSError):
            folder.rmdir()
        os.close(lock)


def _locked(file: Path) -> int | None:
    """The file's descriptor, once no other process has it; None if the file is another one by then.

    The kernel releases it when this process ends, however it ends.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:  # the folder was removed meanwhile
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        warnings.warn(f"{file.parent}: another process is preparing the data set; waiting for it", stacklevel=2)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
    os.close(descriptor)
    return None


def _empty(folder: Path) -> None:
    """Remove everything but the lock, as far as it goes."""
    (folder / RESUMABLE).unlink(missing_ok=True)  # first of all: what a kill leaves of the rest is nobody's
    for name in _entries(folder):
        shutil.rmtree(folder / name, ignore_errors=True)
        with suppress(OSError):
            (folder / name).unlink()  # what is no folder


def _entries(folder: Path) -> set[str]:
    """What lies in the folder beside the lock; nothing if there is no folder."""
    return {entry.name for entry in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
