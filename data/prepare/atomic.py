"""Data sets appear at their place finished or not at all, whatever interrupts their preparation."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from data.batch import DataError


def write_data_set(path: str | Path, write: Callable[[Path], None]) -> bool:
    """Let `write` fill an empty folder with train/ and val/, then rename it to `path` in one step.

    Returns whether it did: it does nothing if `path` holds a finished set. What a killed attempt left beside it
    (`.NAME.preparing-PID`) is in nobody's way. Raises DataError if something else is at `path` or the place cannot be
    written, as on a full disk.
    """
    path = Path(path)
    if is_there(path):
        return False
    # Beside the target, as a rename is atomic within one file system only.
    unfinished = path.parent / f".{path.name}.preparing-{os.getpid()}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        fill(path, unfinished, write)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return True


def fill(path: Path, unfinished: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill the folder `unfinished`, then rename it to `path`; what failed stays in `unfinished`.

    Raises DataError if the place cannot be written, as on a full disk.
    """
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.rename(path)
    except OSError as error:
        # Another process may have been quicker; its set is as good.
        if not _is_finished(path):
            raise DataError(f"{path}: cannot be written ({error}): choose another place, or make room") from error


def is_there(path: Path) -> bool:
    """Whether a finished set is at `path`; DataError if something else is."""
    try:
        exists, finished = path.exists(), _is_finished(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be looked at ({error.strerror}): choose another place") from error
    if exists and not finished:
        raise DataError(
            f"{path}: exists, but train/ or val/ is missing or empty, so it is not overwritten: "
            "move it away, or choose another place"
        )
    return exists


def _is_finished(path: Path) -> bool:
    return all((path / split).is_dir() and any((path / split).iterdir()) for split in ("train", "val"))
