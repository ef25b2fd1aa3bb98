"""Storage that falls silent in the middle of a run: files that turn into pipes, from which nothing ever comes."""

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import launch, options, train, write_image_folder

from train import signals
from train.checkpoint.file import load_checkpoint
from train.loop import patience
from train.loop.patience import Patience


@pytest.mark.parametrize("moment", ["told", "in a step"])
def test_a_run_whose_storage_is_silent_says_so_and_ends_when_it_is_asked_to(tmp_path: Path, moment: str):
    """With DALI, which waits in its own threads and opens pipes; the folder loader refuses them.

    Where it has the images of the step, that is finished and saved, and it is the end of DALI that waits.
    """
    pytest.importorskip("nvidia.dali")
    data = write_image_folder(tmp_path / "data", train=32)
    arguments = options(
        data__loader="dali", data__path=data, data__threads=1, data__batch_size=4, train__epochs=1000,
        prune__method="none", run__root=tmp_path,
    )  # fmt: skip
    seen = {"SIGNAL": moment, "IMAGES": str(data / "train")}
    run = launch("tests/helpers/silent_storage.py", arguments, tmp_path, **seen)
    assert ("does the storage answer?" in run.stderr) == (moment == "told")
    assert "ended; the same command goes on from the last checkpoint" in run.stderr
    assert run.returncode == patience.EXIT_CODE
    if moment == "in a step":
        assert load_checkpoint(tmp_path / "tiny/last.pt")["progress"]["step"] == 5


def test_the_threads_of_a_run_end_before_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The last to hold the images could drop them while the interpreter ends: torch aborts the process then."""
    for room in (patience, signals):
        monkeypatch.setattr(room, "ENDS_WITHIN_S", 60.0)  # the machine may have other work
    before, usual_s = set(threading.enumerate()), sys.getswitchinterval()
    sys.setswitchinterval(60)  # no thread runs unless the main thread waits
    try:
        train(tmp_path, train__epochs=1, prune__method="none")
        left = {thread.name for thread in set(threading.enumerate()) - before}
    finally:
        sys.setswitchinterval(usual_s)
    assert not left


def test_waiting_that_ends_is_no_reason_to_end(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """A loader that is slow again and again, in a run that was asked to stop, is waited for. On a clock of its own."""
    now, looks, ends = [0.0], threading.Semaphore(0), []

    class Loader:
        since = None

        @property
        def waiting_since(self) -> float | None:
            looks.release()
            return self.since

    def is_seen() -> None:
        """Until the thread has looked, by a clock that it read after this began."""
        while looks.acquire(blocking=False):
            pass
        for _ in range(2):
            assert looks.acquire(timeout=60)

    monkeypatch.setattr(patience, "LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(patience.os, "_exit", ends.append)
    loader = Loader()
    with Patience([loader], "DATA", 0, lambda: True):
        is_seen()  # that it was asked to stop
        for _ in range(3):
            loader.since = now[0]
            now[0] += 0.9 * patience.STOP_AFTER_S
            is_seen()
            loader.since = None
    assert capfd.readouterr().err == "" and not ends
