"""The thread that makes the next step's values: what it makes when, its errors, its end."""

import gc
import threading
import weakref

import pytest
from made_images import build, needs_dali, taken

from data import dali
from data.ahead import OneAhead
from data.batch import DataError


def ended(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def test_the_step_after_the_one_that_is_taken_is_begun_and_no_other():
    made, is_begun = [], threading.Semaphore(0)

    def make(step: int) -> tuple[int, threading.Thread]:
        made.append(step)
        is_begun.release()
        return step, threading.current_thread()

    ahead = OneAhead(make)
    value, thread = ahead.take(5)
    assert value == 5 and thread is not threading.current_thread()
    for _ in range(2):
        assert is_begun.acquire(timeout=10)
    assert made == [5, 6]
    assert [ahead.take(step)[0] for step in (6, 7, 2, 3)] == [6, 7, 2, 3]
    ahead.close()
    assert made == [5, 6, 7, 8, 2, 3, 4] and ended(thread)


def test_an_error_comes_with_its_step_as_it_is_and_holds_nobody_s_frames():
    def make(step: int) -> int:
        if step == 1:
            raise DataError("cannot read 1.jpg")
        return step

    class Caller:
        pass

    def fail() -> weakref.ref:
        caller = Caller()
        with pytest.raises(DataError, match=r"^cannot read 1\.jpg$"):
            ahead.take(1)
        return weakref.ref(caller)

    ahead = OneAhead(make)
    assert ahead.take(0) == 0
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()
    assert ahead.take(2) == 2
    ahead.close()


def test_the_thread_ends_with_what_uses_it():
    ahead = OneAhead(lambda step: step)
    thread = ahead._thread
    ahead.take(0)
    del ahead
    assert ended(thread)


@needs_dali
def test_images_are_looked_at_and_read_beside_training(photos, monkeypatch):
    """By a thread of the stream's own, which ends with it and begins anew elsewhere."""
    honest, threads = dali.find_defects, []

    def find(*arguments):
        threads.append(threading.current_thread())
        return honest(*arguments)

    monkeypatch.setattr(dali, "find_defects", find)
    train, _ = build(photos, "dali")
    taken(train, steps=1)
    train.go_to(5)
    taken(train)
    train.close()
    assert threading.current_thread() not in threads and len(set(threads)) == 2
    assert all(map(ended, threads))
