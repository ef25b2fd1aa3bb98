"""Checkpoints are written while training goes on: of the state as it was, and awaited wherever a run ends."""

import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from launching import EVERY_STEP, broken_off, train

from train.checkpoint import file, saver
from train.checkpoint.file import CheckpointError, load_checkpoint
from train.checkpoint.snapshot import snapshot
from train.loop import engine

ONE_EPOCH = EVERY_STEP | {"train__epochs": 1, "prune__method": "none"}
"""Four steps, with a checkpoint after each of them and one at the end."""


def test_training_goes_on_while_a_checkpoint_of_the_state_before_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first checkpoint is not written before the second step has changed the weights."""
    second_step, went_on, written, after = threading.Event(), [], [], []
    honest_save, honest_step = saver.save_checkpoint, engine.training_step

    def save(path: Path, content: dict, keep: int = 1) -> None:
        went_on.append(second_step.wait(timeout=60))
        honest_save(path, content, keep)
        written.append(load_checkpoint(path))

    def step(state, *arguments: object) -> torch.Tensor:
        loss = honest_step(state, *arguments)
        after.append([parameter.detach().clone() for parameter in state.model.parameters()])
        if len(after) == 2:
            second_step.set()
        return loss

    monkeypatch.setattr(saver, "save_checkpoint", save)
    monkeypatch.setattr(engine, "training_step", step)
    train(tmp_path, **ONE_EPOCH)
    assert all(went_on)
    weights = list(written[0]["model"].values())
    assert written[0]["progress"]["step"] == 1
    assert all(torch.equal(found, expected) for found, expected in zip(weights, after[0], strict=True))
    assert not any(torch.equal(found, later) for found, later in zip(weights, after[1], strict=True))


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Checkpoints take a while; returns what was written, once it is."""
    honest, written = file.write_archive, []

    def write(opened: object, content: dict) -> None:
        time.sleep(0.5)
        honest(opened, content)
        written.append(content["progress"])

    monkeypatch.setattr(file, "write_archive", write)
    return written


def test_a_run_that_fails_ends_after_the_checkpoint_that_is_being_written(tmp_path: Path, slow_disk: list[dict]):
    with pytest.MonkeyPatch.context() as patch, broken_off(patch, at_step=3):
        train(tmp_path, **ONE_EPOCH)
    assert [progress["step"] for progress in slow_disk] == [1, 2]
    assert load_checkpoint(tmp_path / "tiny/last.pt")["progress"]["step"] == 2
    assert not list((tmp_path / "tiny").glob("*.part"))


def test_a_run_is_done_when_its_last_checkpoint_is_written_and_the_wait_is_in_the_ledger(
    tmp_path: Path, slow_disk: list[dict]
):
    done = train(tmp_path, **ONE_EPOCH | {"run__save_every_minutes": 0})[-1]
    assert [progress["epoch"] for progress in slow_disk] == [1]
    assert done["event"] == "done" and done["seconds"]["save"] >= 0.5


def test_a_failed_write_is_told_where_the_run_fails_before_it_could_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def full(path: Path, content: dict, keep: int = 1) -> None:
        time.sleep(0.5)
        raise CheckpointError(f"could not write {path}: no space left on {path.parent}")

    monkeypatch.setattr(saver, "save_checkpoint", full)
    with broken_off(monkeypatch, at_step=2):
        train(tmp_path, **ONE_EPOCH)
    assert capsys.readouterr().out.count("no space left on") == 1


def test_the_best_checkpoint_is_serialised_once_for_both_files(tmp_path: Path, slow_disk: list[dict]):
    train(tmp_path, **ONE_EPOCH | {"run__save_every_minutes": 0})
    run = tmp_path / "tiny"
    assert len(slow_disk) == 1
    assert (run / "best.pt").read_bytes() == (run / "last.pt").read_bytes()
    assert (run / "best.pt").stat().st_ino != (run / "last.pt").stat().st_ino  # damage to one leaves the other


def test_a_snapshot_is_equal_and_apart():
    weights = OrderedDict(weight=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    weights._metadata = {"": {"version": 2}}
    content = {"model": weights, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "plain": [{"a": [1, None]}]}
    copied = snapshot(content)
    weights["weight"].zero_()
    content["optimizer"]["state"][0]["step"] += 1
    content["plain"][0]["a"].append(2)
    assert copied["model"]["weight"].abs().sum() > 0
    assert copied["model"]["weight"].is_contiguous(memory_format=torch.channels_last)
    assert type(copied["model"]) is OrderedDict and copied["model"]._metadata == {"": {"version": 2}}
    assert copied["optimizer"] == {"state": {0: {"step": torch.tensor(3.0)}}} and copied["plain"] == [{"a": [1, None]}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_a_snapshot_of_a_gpu_lies_in_pinned_memory():
    weight = torch.randn(256, 256, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    expected = weight.cpu()
    copied = snapshot({"weight": weight})["weight"]
    weight.zero_()
    assert copied.is_pinned() and torch.equal(copied, expected) and copied.stride() == weight.stride()
