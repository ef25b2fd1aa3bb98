"""The next step's values, made on a thread while a step is under way."""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")

ENDS_WITHIN_S = 10.0
"""A thread that waits for a silent disk is left behind after this."""


class OneAhead(Generic[T]):
    """`make(step)` of one step after the other, each begun on a thread of its own once the step before it is taken.

    Where another step is taken than the one that was begun, that one was made for nothing: `make` has to bear that.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._asked: SimpleQueue[int | None] = SimpleQueue()
        self._made: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._begun: int | None = None
        # Not a method: the thread would keep this object from being freed, and so itself from its end.
        work = (make, self._asked, self._made)
        self._thread = Thread(target=_work, args=work, name="inputs of the next step", daemon=True)
        self._thread.start()

    def take(self, step: int) -> T:
        """What `make(step)` returns. Raises what it raises."""
        if self._begun != step:
            if self._begun is not None:
                self._made.get()
            self._asked.put(step)
        value, error = self._made.get()
        self._begun = None
        if error is not None:
            try:
                raise error
            finally:
                del error  # else it holds this frame, which holds it: all callers' frames would be freed late
        self._begun = step + 1
        self._asked.put(self._begun)
        return value

    def close(self) -> None:
        """Let the thread end, and wait for what it has begun; nothing is taken after it."""
        self._asked.put(None)
        self._thread.join(ENDS_WITHIN_S)

    def __del__(self) -> None:
        self._asked.put(None)


def _work(make: Callable[[int], T], asked: SimpleQueue, made: SimpleQueue) -> None:
    while (step := asked.get()) is not None:
        try:
            made.put((make(step), None))
        except BaseException as error:  # whatever it is, who takes the step has to hear of it
            made.put((None, error))
