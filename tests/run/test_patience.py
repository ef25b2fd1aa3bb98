"""Storage that falls silent in the middle of a run: files that turn into pipes, from which nothing ever comes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, SEEN_BY_RANKS, events, options, write_image_folder

from train.log.rundir import read_log
from train.loop import patience
from train.loop.patience import Patience

IMPATIENT = """
import runpy, sys
from train.loop import patience
patience.LOOK_EVERY_S, patience.TELL_AFTER_S, patience.STOP_AFTER_S = .1, 1, 2
sys.argv = ["launch/train.py", *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_whose_storage_is_silent_says_so_and_ends_when_it_is_asked_to(tmp_path: Path):
    """With DALI, which waits in its own threads and opens pipes; the folder loader refuses them."""
    pytest.importorskip("nvidia.dali")
    data = write_image_folder(tmp_path / "data", train=32)
    arguments = options(
        data__loader="dali", data__path=data, data__threads=1, data__batch_size=4, train__epochs=1000,
        prune__method="none", run__root=tmp_path,
    )  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, *arguments],
        cwd=ROOT, env=os.environ | SEEN_BY_RANKS, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _await_epoch(tmp_path / "tiny" / "log.jsonl", run)
        for image in (data / "train").rglob("*.jpg"):
            image.with_suffix(".pipe").unlink(missing_ok=True)
            os.mkfifo(image.with_suffix(".pipe"))
            image.with_suffix(".pipe").replace(image)
        assert "does the storage answer?" in run.stderr.readline()
        assert run.poll() is None, "it waits on"
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=60)[1]
        assert "ended without saving; the same command goes on from the last checkpoint" in said
        assert run.returncode == patience.EXIT_CODE
    finally:
        run.kill()


def test_waiting_that_ends_is_no_reason_to_end(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """A loader that is slow again and again, in a run that was asked to stop, is waited for."""
    monkeypatch.setattr(patience, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(patience, "STOP_AFTER_S", 5.0)
    loader = type("Loader", (), {"waiting_since": None})()
    with Patience([loader], "DATA", 0, lambda: True):
        for _ in range(20):
            loader.waiting_since = time.monotonic()
            time.sleep(0.01)
            loader.waiting_since = None
    assert capfd.readouterr().err == ""


def _await_epoch(log: Path, run: subprocess.Popen) -> None:
    for _ in range(600):
        if log.exists() and events(read_log(log), "epoch"):
            return
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    raise TimeoutError("no epoch in a minute")
