"""Images that do not come: told after a minute, and a run that was asked to stop does not wait for them.

Where storage falls silent in the middle of a run, a rank waits inside DALI or for a worker process. No signal handler
runs there and no step ends, so a thread looks after it. If the storage answers again, training goes on. A run that
has its last step behind it, and is saved, may still wait: DALI ends after the reads that it has begun.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from data import Loader

LOOK_EVERY_S = 1.0
TELL_AFTER_S = 60.0
STOP_AFTER_S = 10.0
"""torchrun and SLURM kill 30 s after they asked."""
ENDS_WITHIN_S = 2.0
EXIT_CODE = 1


class Patience:
    """While it is entered, a thread of this rank watches how long its loaders wait for images."""

    def __init__(self, loaders: Sequence[Loader], path: str, rank: int, stop_wanted: Callable[[], bool]) -> None:
        """path: where the images lie, for the messages. stop_wanted: whether this rank was asked to stop."""
        self._loaders = loaders
        self._path = path
        self._rank = rank
        self._stop_wanted = stop_wanted
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)

    def __enter__(self) -> "Patience":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        # Else the thread may be the last to hold the loaders' tensors, and drop them while the interpreter ends: torch
        # asks for the interpreter's lock then, and the process aborts, its work done.
        self._thread.join(ENDS_WITHIN_S)

    def _watch(self) -> None:
        told_of = asked_at = None
        while not self._left.wait(LOOK_EVERY_S):
            now = time.monotonic()
            if asked_at is None and self._stop_wanted():
                asked_at = now
            since = self._waiting_since()
            if since is None:
                continue
            if now - since >= TELL_AFTER_S and since != told_of:
                self._tell(f"no images from {self._path} for {now - since:.0f} s: does the storage answer? Waiting on")
                told_of = since
            if asked_at is not None and now - max(asked_at, since) >= STOP_AFTER_S:
                self._tell(
                    f"asked to stop, but no images came from {self._path} for {now - since:.0f} s: ended; the "
                    "same command goes on from the last checkpoint"
                )
                os._exit(EXIT_CODE)

    def _waiting_since(self) -> float | None:
        since = [loader.waiting_since for loader in self._loaders]
        return min((moment for moment in since if moment is not None), default=None)

    def _tell(self, message: str) -> None:
        with suppress(OSError):  # os.write, for the main thread may hold the lock of sys.stderr
            os.write(2, f"rank {self._rank}: {message}\n".encode(errors="replace"))
