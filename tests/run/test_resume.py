"""Runs that end in the middle of an epoch and go on: the same numbers, every second counted, every point once."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import (
    ALONE,
    EVERY_STEP,
    TINY,
    broken_off,
    events,
    interrupted,
    numbers,
    train,
    train_undisturbed,
    write_image_folder,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from data import DataError
from launch import evaluate
from launch import train as launch_train
from train import run
from train.checkpoint.file import CheckpointError, load_checkpoint, save_checkpoint
from train.config import parse_config
from train.log.ledger import Ledger
from train.log.rundir import RunDir, read_log
from train.loop import engine
from train.loop.progress import EpochSoFar
from train.loop.trainer import TrainLoop
from train.loop.watch import Watch
from train.signals import HEARD, SECOND_AFTER_S, StopSignals


def points(board: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (epoch, value) of all that lies in a TensorBoard directory, nothing taken back."""
    accumulator = EventAccumulator(str(board), purge_orphaned_data=False, size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(p.step, p.value) for p in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def signalled(monkeypatch: pytest.MonkeyPatch, at: str, call: int = 1, number: int = signal.SIGTERM) -> None:
    """Let a function of the engine send a signal to this process when it is called that time."""
    honest, calls, listening = getattr(engine, at), [], []

    class Known(StopSignals):
        def __enter__(self) -> StopSignals:
            listening.append(self)
            return super().__enter__()

    def function(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            assert listening[-1].wait(60)  # for the thread that hears it
        return honest(*arguments, **options)

    monkeypatch.setattr(run, "StopSignals", Known)
    monkeypatch.setattr(engine, at, function)


def begin(root: Path, **changes: object) -> dict:
    """The closing event of tests/helpers/tiny.yaml with overrides, in this process."""
    overrides = [text for key, value in changes.items() for text in (f"--{key.replace('__', '.')}", str(value))]
    config = parse_config(["--config", str(TINY), *overrides, "--run.root", str(root)], "train.py", "")
    return run.run(config, ALONE, Ledger())


@pytest.mark.parametrize("at_step", [2, 5, 6, 8])
def test_a_run_goes_on_at_the_step_after_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int):
    """Before a cut, right after it, and in the middle of both epochs, with moving average and mixed images."""
    changes = {**EVERY_STEP, "train__ema_decay": 0.9, "train__mixup": 0.3}
    undisturbed = train_undisturbed(tmp_path / "a", **changes)
    again = interrupted(tmp_path / "b", monkeypatch, at_step, **changes)
    (begun,) = events(again, "run")[-1:]
    assert (begun["first_epoch"], begun["first_step"]) == divmod(at_step - 1 + 4, 4)
    assert numbers(again) == numbers(undisturbed)
    keys = ("epoch", "step", "removed", "digest", "loss_before", "loss_after")
    assert [[e[k] for k in keys] for e in events(again, "resize")] == [
        [e[k] for k in keys] for e in events(undisturbed, "resize")
    ]
    stored = [load_checkpoint(tmp_path / root / "tiny/last.pt") for root in "ab"]
    for part in ("model", "ema"):
        assert all(torch.equal(stored[0][part][name], stored[1][part][name]) for name in stored[0][part])
    momenta = [[s["momentum_buffer"] for s in content["optimizer"]["state"].values()] for content in stored]
    assert all(map(torch.equal, *momenta))
    assert points(tmp_path / "b/tiny/tensorboard").keys() == points(tmp_path / "a/tiny/tensorboard").keys()
    for tag, shown in points(tmp_path / "b/tiny/tensorboard").items():
        assert [epoch for epoch, _ in shown] == sorted({epoch for epoch, _ in shown}), tag


@pytest.mark.parametrize(
    ("function", "call", "where", "number"),
    [
        ("training_step", 3, (1, 3), signal.SIGTERM),
        ("evaluate", 1, (1, 4), signal.SIGHUP),  # the terminal is gone
        ("_act", 3, (2, 1), signal.SIGTERM),  # at the start of epoch 2
    ],
)
def test_a_signal_stops_a_run_after_its_step_and_the_run_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, where: tuple[int, int], number: int
):
    undisturbed = train_undisturbed(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.watch.MAX_STEPS", 1)
        signalled(patch, function, call, number)
        stopped = begin(tmp_path / "b")
    assert (stopped["event"], stopped["epoch"], stopped["step"]) == ("stopped", *where)
    again = train(tmp_path / "b")
    assert numbers(again) == numbers(undisturbed)
    assert events(again, "run")[-1]["first_step"] == where[1]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_ctrl_c_ends_with_code_0_and_the_line_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    with broken_off(monkeypatch, at_step=3):  # an older run, which is not the one to go on with
        train(tmp_path)
    signalled(monkeypatch, "training_step", 2, signal.SIGINT)
    arguments = ["--config", str(TINY), "--run.root", str(tmp_path), "--run.resume", "never"]
    assert launch_train.main(arguments) == 0
    said = capfd.readouterr()
    assert "stopping after this step; Ctrl-C again ends at once" in said.err
    line, again = said.out.splitlines()[-1], ["--run.name", "tiny-2", "--run.resume", "auto"]
    assert line.startswith("stopped in epoch 1, after step 2, and saved; to go on: ")
    assert line.endswith(f"--run.root {tmp_path} --run.resume never {' '.join(again)}")
    assert launch_train.main([*arguments, *again]) == 0
    assert read_log(tmp_path / "tiny-2/log.jsonl")[-1]["event"] == "done"


def test_a_second_ctrl_c_ends_at_once_even_where_python_does_not_run(tmp_path: Path):
    """In a child, for it ends the process: the main thread sits in a read that never returns."""
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(there, 2)
            with StopSignals():
                os.write(2, b"ready\n")
                os.read(os.pipe()[0], 1)  # restarts after each signal: the main thread never gets out of it
        finally:
            os._exit(1)
    os.close(there)  # so that a child that is gone ends the reading
    try:
        assert os.read(here, 6) == b"ready\n"
        os.kill(pid, signal.SIGINT)
        assert os.read(here, len(HEARD)) == HEARD
        time.sleep(SECOND_AFTER_S + 0.1)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # the first one only asks
        os.kill(pid, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    finally:
        os.close(here)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_seconds_after_the_last_checkpoint_are_lost_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    with broken_off(monkeypatch, at_step=8):  # 3 steps after epoch 1's checkpoint
        train(tmp_path)
    alive = json.loads((tmp_path / "tiny/alive.json").read_text())
    stored = load_checkpoint(tmp_path / "tiny/last.pt")["ranks"][0]["ledger"]
    lost = alive["wall_s"] - sum(stored["seconds"].values())
    assert lost > 0
    log = train(tmp_path)
    assert events(log, "epoch")[1]["seconds"]["lost"] == pytest.approx(lost)
    assert events(log, "epoch")[0]["seconds"]["lost"] == 0
    done = log[-1]
    assert done["seconds"]["lost"] == pytest.approx(lost)
    assert done["gpu_hours"] == pytest.approx(done["time_s"] / 3600) and done["time_s"] > alive["wall_s"]
    assert not (tmp_path / "tiny/alive.json").exists()


def test_an_error_leaves_word_of_the_seconds_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As after the minutes in which a rank waits for one that is gone."""
    with broken_off(monkeypatch, at_step=4):
        monkeypatch.setattr(engine, "set_learning_rate", lambda *arguments: time.sleep(0.3))
        train(tmp_path)
    alive = json.loads((tmp_path / "tiny/alive.json").read_text())
    began = read_log(tmp_path / "tiny/log.jsonl")[0]["time_s"]
    assert alive["wall_s"] - began > 1.1  # four times, of which the beat every second may have missed one


def test_seconds_of_a_run_that_was_killed_before_its_first_checkpoint_are_counted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with broken_off(monkeypatch, at_step=1):
        train(tmp_path)
    assert json.loads((tmp_path / "tiny/alive.json").read_text())["wall_s"] > 0  # its startup
    (tmp_path / "tiny/alive.json").write_text('{"wall_s": 100.0, "rank_s": 400.0}')  # of four ranks
    done = train(tmp_path)[-1]
    assert done["seconds"]["lost"] == 100
    assert done["gpu_hours"] * 3600 == pytest.approx(done["time_s"] - 100 + 400)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "gone"])
def test_a_damaged_checkpoint_makes_way_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    changes = {**EVERY_STEP, "run__keep": 2}
    undisturbed = train_undisturbed(tmp_path / "a", **changes)
    with broken_off(monkeypatch, at_step=8):
        train(tmp_path / "b", **changes)
    assert sorted(file.name for file in (tmp_path / "b/tiny").glob("last*")) == ["last-1.pt", "last.pt"]
    last = tmp_path / "b/tiny/last.pt"
    content = bytearray(last.read_bytes())
    if damage == "gone":
        last.unlink()
    else:
        content[len(content) // 2] ^= 1
        last.write_bytes(content[:-1000] if damage == "cut short" else content)
    again = train(tmp_path / "b", **changes)
    assert numbers(again) == numbers(undisturbed)
    assert events(again, "run")[-1]["first_step"] == 2
    notes = [event["message"] for event in events(again, "note") if "last-1.pt" in event["message"]]
    assert len(notes) == (damage != "gone") and all("last.pt is damaged" in note for note in notes)
    assert (tmp_path / "b/tiny/last.pt.damaged").exists() == (damage != "gone")


def test_the_first_save_after_a_damaged_checkpoint_keeps_the_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {**EVERY_STEP, "run__keep": 2}
    with broken_off(monkeypatch, at_step=8):
        train(tmp_path, **changes)
    last, good = tmp_path / "tiny/last.pt", tmp_path / "tiny/last-1.pt"
    last.write_bytes(last.read_bytes()[:-1000])
    before = good.read_bytes()
    with broken_off(monkeypatch, at_step=2):  # after one step and its checkpoint
        train(tmp_path, **changes)
    load_checkpoint(last)
    assert good.read_bytes() == before


def test_where_no_checkpoint_can_be_read_the_run_does_not_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with broken_off(monkeypatch, at_step=7):
        train(tmp_path, **EVERY_STEP)
    before = {}
    for path in (tmp_path / "tiny").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:5000])
        before[path] = path.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"last\.pt is damaged.*last-1\.pt is.*delete them to start this run over"
    ):
        train(tmp_path, **EVERY_STEP)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_that_lost_its_checkpoints_does_not_start_over_but_one_killed_in_its_first_save_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    undisturbed = train(tmp_path / "a", train__epochs=2, prune__last_epoch=2)
    with broken_off(monkeypatch, at_step=8):
        train(tmp_path / "b", train__epochs=2, prune__last_epoch=2)
    (tmp_path / "b/tiny/last.pt").unlink()  # epoch 1's line and best.pt stay, as a kill between the two leaves them
    assert numbers(train(tmp_path / "b", train__epochs=2, prune__last_epoch=2)) == numbers(undisturbed)
    log = tmp_path / "b/tiny/log.jsonl"
    log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines() if '"done"' not in line))
    for path in (tmp_path / "b/tiny").glob("*.pt"):
        path.unlink()
    before = log.read_bytes()
    with pytest.raises(CheckpointError, match=r"holds 2 epochs of an unfinished run, but last\.pt"):
        train(tmp_path / "b", train__epochs=2, prune__last_epoch=2)
    assert log.read_bytes() == before


def test_a_checkpoint_in_the_middle_of_an_epoch_can_be_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with broken_off(monkeypatch, at_step=7):
        train(tmp_path, **EVERY_STEP)
    assert evaluate.main([str(tmp_path / "tiny/last.pt")]) == 0
    assert "32 images" in capsys.readouterr().out


def as_of(stored: dict, ranks: int) -> dict:
    """The checkpoint as so many ranks would have written it."""
    return stored | {"ranks": [stored["ranks"][0]] * ranks}


def test_another_number_of_ranks_takes_up_the_epoch_at_the_same_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Written by three ranks with batches of 24: 3 of 5 steps are 72 images, here 2 of 4 steps of 32."""
    changes = {"data__batch_size": 24, "optim__lr": 0.024}
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.watch.MAX_STEPS", 1)
        signalled(patch, "training_step", 3)
        begin(tmp_path, **changes)
    path = tmp_path / "tiny/last.pt"
    stored = load_checkpoint(path)
    mean = float(stored["ranks"][0]["so_far"]["loss_sum"]) / 3
    config = {**stored["config"], "data": {**stored["config"]["data"], "batch_size": 32}}
    save_checkpoint(path, as_of(stored, 3) | {"config": config})
    text = (tmp_path / "tiny/config.yaml").read_text()
    (tmp_path / "tiny/config.yaml").write_text(text.replace("batch_size: 24", "batch_size: 32"))
    seen: list[float] = []
    honest = engine.train_epoch

    def train_epoch(loop: TrainLoop, epoch: int, so_far: EpochSoFar, *others: Any) -> None:
        if not seen:
            seen.extend([so_far.step, float(so_far.loss_sum) / so_far.step])
        honest(loop, epoch, so_far, *others)

    monkeypatch.setattr(engine, "train_epoch", train_epoch)
    log = train(tmp_path, **changes | {"data__batch_size": 32})
    assert seen == [2, pytest.approx(mean)]
    assert "resumed on 1 ranks, stored by 3" in events(log, "note")[0]["message"]


def test_all_ranks_look_at_the_same_steps_and_the_saving_follows_rank_0_s_clock():
    now = [0.0]

    class Main:
        is_main = True

        def all_reduce_max(self, values: list[int]) -> list[int]:
            Main.answer = list(map(int, values))
            return Main.answer

    class Other:
        is_main = False

        def all_reduce_max(self, values: list[int]) -> list[int]:
            assert values[1] == values[4] == 0  # neither its clock nor its speed counts
            return [max(pair) for pair in zip(map(int, values), Main.answer, strict=True)]

    main, other = (Watch(world, lambda: False, save_every_s=10, clock=lambda: now[0]) for world in (Main(), Other()))
    decisions = []
    for _ in range(400):
        now[0] += 0.1
        decisions.append((main.step(lambda: False), other.step(lambda: False)))
    assert all(one == two for one, two in decisions)
    looked = [number for number, (one, _) in enumerate(decisions) if one is not None]
    assert len(looked) == pytest.approx(40, abs=3)  # once a second, at ten steps a second
    assert sum(one.save for one, _ in decisions if one) > 1


def test_what_one_rank_sees_is_decided_for_all():
    class Heard:
        is_main = True

        def all_reduce_max(self, values: list[int]) -> list[int]:
            return [max(pair) for pair in zip(map(int, values), [1, 0, 1, 1, 0], strict=True)]

    decision = Watch(Heard(), lambda: False).poll()
    assert decision.stop and decision.broken and decision.saved and not decision.save


def test_a_finished_run_is_not_begun_again_by_the_job_that_finished_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    monkeypatch.setattr(run, "AGENT_SIGNAL_TIMEOUT_S", 0)
    first = begin(tmp_path, run__resume="never")
    capsys.readouterr()
    assert begin(tmp_path, run__resume="never")["time_s"] == first["time_s"]
    assert f"{tmp_path / 'tiny'} was finished by this job" in capsys.readouterr().out
    assert not (tmp_path / "tiny-2").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without --rdzv-id: any job may be called so
    assert RunDir(Path(begin(tmp_path)["directory"])).path == tmp_path / "tiny-2"


def test_a_restart_of_a_job_goes_on_in_its_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-18")
    for _ in range(2):
        with broken_off(monkeypatch, at_step=7):
            train(tmp_path, run__resume="never")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-19")
    train(tmp_path, run__resume="never")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny-2"]


def test_a_loader_state_that_does_not_fit_still_goes_on_at_the_same_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As after an update of DALI. Made images draw nothing at random, so the numbers stay the same."""
    undisturbed = train(tmp_path / "a", **EVERY_STEP)
    with broken_off(monkeypatch, at_step=7):
        train(tmp_path / "b", **EVERY_STEP)

    def refuse(self: object, state: dict) -> None:
        raise DataError("the stored loader state belongs to other data or options")

    monkeypatch.setattr("data.loader.SplitLoader.load_state_dict", refuse)
    again = train(tmp_path / "b", **EVERY_STEP)
    assert numbers(again) == numbers(undisturbed)
    assert any("other data or options" in note["message"] for note in events(again, "note"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_set_that_has_changed_since_the_checkpoint_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
):
    """As after launch/prepare.py check, which an error over a broken image advises. 48 images are 6 steps, 44 are 5."""
    images = write_image_folder(tmp_path / "images")
    changes = {"data__loader": "folder", "data__path": images, "data__batch_size": 8, "data__threads": 1}
    with broken_off(monkeypatch, at_step=5):
        train(tmp_path, **changes, **EVERY_STEP)
    if ranks > 1:
        path = tmp_path / "tiny/last.pt"
        save_checkpoint(path, as_of(load_checkpoint(path), ranks))
    (images / "exclude.txt").write_text("".join(f"train/class0/{number}.jpg\n" for number in range(4)))
    log = train(tmp_path, **changes, **EVERY_STEP)
    notes = [note["message"] for note in events(log, "note")]
    [note] = [note for note in notes if "training images" in note and "checkpoint" in note]
    assert note.startswith("the training images are not those of the checkpoint") and "come twice" in note
    assert any("stored by 2" in note for note in notes) == (ranks == 2)
    assert not any("augmentation draws other numbers than before" in note for note in notes)
    assert events(log, "done")[0]["steps"] == 4 + 1 + 5


class Blurred(nn.Module):
    """Has a buffer that no state dict holds, as timm's BlurPool2d."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 5, stride=4), nn.BatchNorm2d(8), nn.Linear(8 * 36, 10)
        self.register_buffer("blur", torch.tensor(0.5), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc((self.norm(self.conv(images)) * self.blur).flatten(1))


def test_buffers_that_no_state_dict_holds_are_no_part_of_a_checkpoint_in_mid_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("train.build.build_model", lambda *_: Blurred())
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    settings = {**EVERY_STEP, "prune__method": "none", "train__ema_decay": 0.9}
    undisturbed = train(tmp_path / "a", **settings)
    assert numbers(interrupted(tmp_path / "b", monkeypatch, 7, **settings)) == numbers(undisturbed)
