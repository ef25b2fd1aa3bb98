"""Progress bars on the terminal's stderr; where there is none, nothing is printed."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The items, with a bar of how many of `total` are done."""
    console = Console(stderr=True)
    return rich.progress.track(items, what, total=total, console=console, disable=not console.is_terminal)


def opened(path: Path, what: str) -> AbstractContextManager[BinaryIO]:
    """The file open for reading bytes, with a bar of how much was read."""
    console = Console(stderr=True)
    return rich.progress.open(path, "rb", description=what, console=console, disable=not console.is_terminal)
