"""Disks that are full, read-only or gone: training goes on where it can, says so once, and never loses a checkpoint."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import EVERY_STEP, events, numbers, train

from train.checkpoint import saver
from train.checkpoint.file import CheckpointError, load_checkpoint
from train.errors import TrainError
from train.log.rundir import RunDir, read_log
from train.log.sinks import JsonLines, Sinks
from train.log.trackers import TensorBoard
from train.loop import engine
from train.loop.evaluation import Evaluation

NO_TRACEBACK = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
"""Of threads, such as TensorBoard's; pytest takes them for warnings."""


def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], Any]]) -> None:
    """Call these before these training steps (1, 2, ...)."""
    honest, taken = engine.training_step, []

    def step(*arguments: object) -> torch.Tensor:
        taken.append(1)
        actions.get(len(taken), lambda: None)()
        return honest(*arguments)

    monkeypatch.setattr(engine, "training_step", step)
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)


def test_a_full_disk_for_a_while_costs_nothing_but_the_checkpoints_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = train(tmp_path / "a", **EVERY_STEP)
    honest, kept = torch.save, []

    def step_of_last() -> int:
        return load_checkpoint(tmp_path / "b/tiny/last.pt")["progress"]["step"]

    def fill() -> None:
        while step_of_last() < 2:  # it is written while training goes on
            time.sleep(0.01)
        kept.append(step_of_last())
        torch.save = full_disk

    def clear() -> None:
        kept.append(step_of_last())
        torch.save = honest

    try:
        at_step(monkeypatch, {3: fill, 7: clear})
        log = train(tmp_path / "b", **EVERY_STEP)
    finally:
        torch.save = honest
    assert kept == [2, 2]  # nothing took the place of the good one
    notes = [event["message"] for event in events(log, "note")]
    assert (
        len(notes) == 2
        and f"no space left on {tmp_path / 'b/tiny'}" in notes[0]
        and notes[0].endswith("training goes on")
    )
    assert notes[1] == "checkpoints can be written again"
    assert numbers(log) == numbers(undisturbed) and log[-1]["event"] == "done"
    assert not list((tmp_path / "b/tiny").glob("*.part"))


def test_a_run_that_cannot_be_saved_at_its_end_fails_and_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(TrainError, match=r"not saved as it stands.*no space left.*the same command goes on"):
        train(tmp_path)
    log = read_log(tmp_path / "tiny/log.jsonl")
    assert [event["epoch"] for event in events(log, "epoch")] == [1, 2, 3]
    assert not events(log, "done") and len(events(log, "note")) == 1
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"3 epochs of an unfinished run.*delete the directory to start over"):
        train(tmp_path)
    assert read_log(tmp_path / "tiny/log.jsonl") == log  # nothing was cut off
    shutil.rmtree(tmp_path / "tiny")
    assert train(tmp_path)[-1]["event"] == "done"


def test_a_best_that_cannot_be_written_leaves_last_alone_and_does_not_count_as_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest, tried = saver.save_checkpoint, []

    def save(path: Path, content: dict, keep: int = 1) -> None:
        if path.name == "best.pt":
            tried.append(content["progress"]["epoch"])
            if len(tried) == 1:
                raise CheckpointError(f"could not write {path}: No space left on device")
        honest(path, content, keep)

    tops = iter([90.0, 80.0, 70.0])
    monkeypatch.setattr(saver, "save_checkpoint", save)
    monkeypatch.setattr(engine, "evaluate", lambda *arguments: Evaluation(next(tops), 99.0, 32))
    log = train(tmp_path)
    assert tried == [1, 2]  # the second beats nothing but what could be written
    stored = load_checkpoint(tmp_path / "tiny/best.pt")["progress"]
    assert (stored["epoch"], stored["best_top1"], log[-1]["best_top1"]) == (2, 80.0, 80.0)
    assert load_checkpoint(tmp_path / "tiny/last-2.pt")["progress"]["best_top1"] == -1.0  # epoch 1's was written


@NO_TRACEBACK
def test_a_run_directory_that_is_removed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def remove() -> None:
        while (tmp_path / "tiny").exists():  # the heartbeat may write into it meanwhile
            shutil.rmtree(tmp_path / "tiny", ignore_errors=True)

    at_step(monkeypatch, {6: remove})
    log = train(tmp_path)
    assert [event["epoch"] for event in events(log, "epoch")] == [1, 2, 3]  # the lines are kept in memory, too
    assert [event["event"] for event in log[:1]] == ["run"]
    assert log[-1]["event"] == "done"
    assert {"config.yaml", "last.pt", "log.jsonl"} <= {path.name for path in (tmp_path / "tiny").iterdir()}


@NO_TRACEBACK
def test_a_directory_that_cannot_be_made_again_ends_in_an_error_after_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def replace_by_file() -> None:
        (tmp_path / "runs").rename(tmp_path / "elsewhere")
        (tmp_path / "runs").write_text("not a folder")

    at_step(monkeypatch, {6: replace_by_file})
    with pytest.raises(TrainError, match=r"the run is not saved as it stands.*runs/tiny"):
        train(tmp_path / "runs")
    assert (tmp_path / "runs").read_text() == "not a folder"


@pytest.mark.parametrize("question", ["JsonLines.text", "RunDir.config"])
def test_a_network_drive_that_answers_nothing_for_a_while_costs_nothing_but_the_checkpoints_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str
):
    def stale(self: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    owner, name = (JsonLines, "text") if question == "JsonLines.text" else (RunDir, "config")
    honest = getattr(owner, name)
    actions = {6: lambda: setattr(owner, name, property(stale)), 8: lambda: setattr(owner, name, honest)}
    try:
        at_step(monkeypatch, actions)
        log = train(tmp_path, **EVERY_STEP)
    finally:
        setattr(owner, name, honest)
    notes = [event["message"] for event in events(log, "note")]
    assert any("Stale file handle" in note for note in notes) and notes[-1] == "checkpoints can be written again"
    assert log[-1]["event"] == "done"


class FullFile:
    """A file on a disk on which so many bytes more have room."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, line: bytes) -> int:
        written = self.file.write(line[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_log_lines_wait_for_room_and_none_is_cut_or_lost(tmp_path: Path):
    log = JsonLines(tmp_path / "log.jsonl")
    console: list[str] = []

    class Console:
        name = "the console"

        def write(self, event: dict) -> None:
            console.append(event.get("message", ""))

        def close(self) -> None: ...

    sinks = Sinks([log, Console()], log)
    sinks.write({"event": "epoch", "time_s": 1, "number": 1})
    log._file = full = FullFile(log._file, room=10)
    for number in (2, 3):
        sinks.write({"event": "epoch", "time_s": 1, "number": number})
    assert sinks.unwritten == 3  # both, and the note about it
    assert [event["number"] for event in read_log(tmp_path / "log.jsonl")] == [1]
    full.room = 10**6
    sinks.write({"event": "epoch", "time_s": 1, "number": 4})
    assert sinks.unwritten == 0
    sinks.close()
    assert [event.get("number") for event in read_log(tmp_path / "log.jsonl")] == [1, 2, None, 3, 4]
    assert len([message for message in console if f"cannot write the log: no space left on {tmp_path}" in message]) == 1


def test_a_log_that_stays_unwritten_makes_the_end_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    honest = JsonLines._open

    def without_room(self: JsonLines) -> None:
        honest(self)
        self._file = FullFile(self._file, room=0)

    monkeypatch.setattr(JsonLines, "_open", without_room)
    with pytest.raises(TrainError, match=r"trained to the end, but \d+ lines of .*log\.jsonl could not be written"):
        train(tmp_path)
    assert load_checkpoint(tmp_path / "tiny/last.pt")["progress"]["epoch"] == 3
    monkeypatch.undo()
    assert train(tmp_path)[-1]["event"] == "done"


def test_curves_that_cannot_be_written_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: TensorBoard, values: dict, event: dict) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(TensorBoard, "_add", fail)
    log = train(tmp_path)
    notes = [event["message"] for event in events(log, "note")]
    assert len(notes) == 1 and notes[0].startswith("tensorboard can no longer be written and is left out")
    assert log[-1]["event"] == "done"


def test_curves_that_cannot_be_opened_are_left_out(tmp_path: Path):
    train(tmp_path, train__epochs=1, prune__last_epoch=1)
    (tmp_path / "tiny/log.jsonl").unlink()
    shutil.rmtree(tmp_path / "tiny/tensorboard")
    (tmp_path / "tiny/tensorboard").write_text("a file where the folder should be")
    log = train(tmp_path, train__epochs=1, prune__last_epoch=1)
    assert any("tensorboard is left out" in event["message"] for event in events(log, "note"))
    assert log[-1]["event"] == "done"
