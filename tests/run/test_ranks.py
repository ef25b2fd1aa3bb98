"""Whole runs on real ranks: what the log holds, bit-equality after a resize, faults on one rank, kill and resume."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import launch, options, rank_lines, start, write_image_folder

from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import stored_plans
from train.log.rundir import read_log

EPOCH_KEYS = (
    *("event", "time_s", "epoch", "threshold", "flops_reduction", "flops", "macs_reduction", "macs", "params"),
    *("widths", "train_loss", "top1", "top5", "lr", "images_per_s", "seconds", "gpu_hours", "device"),
)

JPEGS = {
    **{"data__loader": "auto", "data__path": "images", "data__batch_size": 16, "data__channels": 3},
    **{"data__crop_scale": "[0.8, 1.0]", "model__name": "resnet20_cifar", "train__ema_decay": 0.5},
}
SHORT = {"train__epochs": 1, "prune__method": "none", "run__save_every_minutes": 1e-9}  # 4 steps, saved after each


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks with batch norm and EMA, from JPEGs that rank 0 lists; its working folder."""
    cwd = tmp_path_factory.mktemp("two_ranks")
    write_image_folder(cwd / "images", train=32)
    result = launch("tests/helpers/faulty_train.py", options(**JPEGS), cwd, ranks=2, FAULT="cannot list")
    assert result.returncode == 0, result.stderr
    return cwd


def test_the_run_directory_holds_all_that_the_readme_names(finished: Path):
    names = {path.name for path in (finished / "runs/tiny").iterdir()}
    assert names == {"config.yaml", "log.jsonl", "tensorboard", "last.pt", "last-1.pt", "last-2.pt", "best.pt"}
    assert list((finished / "runs/tiny/tensorboard").iterdir())


def test_epoch_lines_hold_every_key_of_the_design(finished: Path):
    epochs = [event for event in read_log(finished / "runs/tiny/log.jsonl") if event["event"] == "epoch"]
    assert [event["epoch"] for event in epochs] == [1, 2, 3]
    for event in epochs:
        assert set(EPOCH_KEYS) <= set(event)
    assert epochs[0]["flops_reduction"] == 1
    assert 2.0 <= epochs[-1]["flops_reduction"] <= 2.02
    assert epochs[-1]["gpu_hours"] == pytest.approx(epochs[-1]["time_s"] * 2 / 3600)


def test_the_kinds_of_seconds_add_up_to_wall_time(finished: Path):
    """Those of rank 0, whose clock the log follows; the other ranks' clocks begin when they are started."""
    log = read_log(finished / "runs/tiny/log.jsonl")
    total_s = 0.0
    for event in (event for event in log if event["event"] == "epoch"):
        ranks = event["seconds_by_rank"]
        assert len(ranks) == 2
        assert event["seconds"] == {kind: pytest.approx((ranks[0][kind] + ranks[1][kind]) / 2) for kind in ranks[0]}
        total_s += sum(ranks[0].values())
        assert total_s == pytest.approx(event["time_s"])
    done = log[-1]
    assert sum(done["seconds"].values()) == pytest.approx(done["time_s"])
    assert done["time_s"] >= total_s


def test_ranks_hold_equal_bits_after_every_resize(finished: Path):
    resizes = [event for event in read_log(finished / "runs/tiny/log.jsonl") if event["event"] == "resize"]
    assert len(resizes) == 2
    for event in resizes:
        assert len(event["digests"]) == 2
        assert set(event["digests"]) == {event["digest"]}
        assert sum(event["removed"].values()) > 0
        assert event["flops_reduction_after"] > event["flops_reduction_before"] >= 1


def test_checkpoint_loads_without_unpickling_and_holds_widths_momentum_and_plans(finished: Path):
    stored = torch.load(finished / "runs/tiny/last.pt", weights_only=True)
    name = "layer3.0.conv1"
    width = stored["widths"][name]
    assert width < 64
    weight = stored["model"][f"{name}.weight"]
    assert weight.shape[0] == stored["ema"][f"module.{name}.weight"].shape[0] == width
    state, shapes = stored["optimizer"]["state"], [v.shape for k, v in stored["model"].items() if _is_parameter(k)]
    assert [state[index]["momentum_buffer"].shape for index in range(len(state))] == shapes
    assert len(stored_plans(stored)[0].kept[name]) >= width
    assert len(stored["ranks"]) == 2


def test_evaluate_gives_the_logged_accuracy_of_the_checkpoint(finished: Path):
    done = read_log(finished / "runs/tiny/log.jsonl")[-1]
    result = launch("launch/evaluate.py", ["runs/tiny/last.pt"], finished)
    assert result.returncode == 0, result.stderr
    assert done["top1"] > 50
    assert f"top-1 {done['top1']:.3f}%" in result.stdout
    assert "18 images" in result.stdout
    assert f"{done['params']:,} parameters" in result.stdout


def test_a_finished_run_is_kept_and_the_next_one_is_numbered(finished: Path):
    before = (finished / "runs/tiny/log.jsonl").read_bytes()
    arguments = options(train__epochs=1, prune__last_epoch=1)
    result = launch("launch/train.py", arguments, finished)
    assert result.returncode == 0, result.stderr
    assert (finished / "runs/tiny/log.jsonl").read_bytes() == before
    assert read_log(finished / "runs/tiny-2/log.jsonl")[-1]["event"] == "done"


def _is_parameter(key: str) -> bool:
    return key.endswith(("weight", "bias"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("other weights", "the ranks do not start from equal weights"),
        ("plan", "the ranks differ after the resize"),
        ("one bit of momentum", "the ranks differ after the resize"),
    ],
)
def test_a_rank_that_goes_another_way_ends_both_with_a_clear_line(tmp_path: Path, fault: str, message: str):
    result = launch("tests/helpers/faulty_train.py", options(), tmp_path, ranks=2, FAULT=fault)
    assert result.returncode != 0
    lines = rank_lines(result.stderr)
    assert sorted(line[:8] for line in lines) == ["[rank 0]", "[rank 1]"]
    assert all(message in line for line in lines)


def test_an_unforeseen_failure_on_one_rank_ends_the_other_with_its_reason(tmp_path: Path):
    result = launch("tests/helpers/faulty_train.py", options(), tmp_path, ranks=2, FAULT="a bug")
    assert result.returncode != 0
    assert "[rank 0] error: rank 1 failed: a bug on this rank" in result.stderr
    assert "AssertionError: a bug on this rank" in result.stderr  # which keeps its traceback


def test_a_broken_image_on_one_rank_ends_both_and_names_the_file(tmp_path: Path):
    images = write_image_folder(tmp_path / "images", train=60)
    broken = images / "train/class1/7.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = options(data__loader="folder", data__path="images", data__threads=1)
    result = launch("launch/train.py", arguments, tmp_path, ranks=2)
    assert result.returncode != 0
    assert any("images/train/class1/7.jpg" in line for line in rank_lines(result.stderr))
    assert not (tmp_path / "runs/tiny/last.pt").exists()


def test_torchrun_takes_up_a_run_of_which_a_rank_was_killed_to_the_numbers_of_an_undisturbed_one(finished: Path):
    """SIGKILL of rank 1 at the 4th of 6 steps of epoch 3; DALI, batch norm, EMA, two resizes before it."""
    fault = {"FAULT": "killed", "AT_STEP": "16", "torchrun": ["--max-restarts=3"]}
    # Never: the restart of a job goes on in the directory that it began, whatever is said about earlier runs.
    arguments = options(**JPEGS, run__root="b", run__resume="never", run__save_every_minutes=0.01)
    killed = start("tests/helpers/faulty_train.py", arguments, finished, ranks=2, **fault)
    assert killed.returncode == 0, killed.stderr
    assert re.search(r"resumed at epoch [23] of 3", killed.stdout)
    assert [path.name for path in (finished / "b").iterdir()] == ["tiny"]
    a, b = read_log(finished / "runs/tiny/log.jsonl"), read_log(finished / "b/tiny/log.jsonl")
    for kind, keys in (
        ("epoch", ("epoch", "widths", "train_loss", "top1", "top5", "lr", "flops_reduction", "threshold")),
        ("resize", ("epoch", "step", "removed", "digest", "threshold")),
    ):
        expected, found = ([[e[k] for k in keys] for e in log if e["event"] == kind] for log in (a, b))
        assert found == expected
    for key in ("model", "ema"):
        one, other = (torch.load(finished / d / "tiny/last.pt", weights_only=True)[key] for d in ("runs", "b"))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four ranks of which one was killed after the second of four steps; its working folder."""
    cwd = tmp_path_factory.mktemp("four_ranks")
    result = launch("tests/helpers/faulty_train.py", options(**SHORT), cwd, ranks=4, FAULT="killed", AT_STEP="3")
    assert result.returncode != 0
    assert load_checkpoint(cwd / "runs/tiny/last.pt")["progress"]["step"] == 2
    return cwd


def test_gradients_are_summed_in_the_same_order_after_a_resume(killed: Path, tmp_path: Path):
    """With more than two ranks the order shows in the bits, and DDP changes it after its first backward pass."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    for options_of in (options(**SHORT), options(**SHORT, run__root="undisturbed")):
        result = launch("launch/train.py", options_of, tmp_path, ranks=4)
        assert result.returncode == 0, result.stderr
    assert read_log(tmp_path / "runs/tiny/log.jsonl")[-1]["event"] == "done"
    one, other = (load_checkpoint(tmp_path / root / "tiny/last.pt")["model"] for root in ("runs", "undisturbed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_fewer_ranks_go_on_with_a_batch_that_they_can_share(killed: Path, tmp_path: Path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    result = launch("launch/train.py", options(**SHORT), tmp_path, ranks=3)
    assert result.returncode == 0, result.stderr
    log = read_log(tmp_path / "runs/tiny/log.jsonl")
    assert "3 ranks cannot share batches of 32 images: going on with 30, and optim.lr 0.046875" in str(log)
    begun = [event for event in log if event["event"] == "run"][-1]
    assert (begun["first_step"], begun["batch_size"], begun["world_size"]) == (2, 30, 3)
    assert log[-1]["event"] == "done"


def test_ranks_that_wait_for_one_that_is_stuck_give_up_after_the_timeout_of_the_run(tmp_path: Path):
    arguments = options(**SHORT, run__timeout_minutes=0.1)
    result = launch("tests/helpers/faulty_train.py", arguments, tmp_path, ranks=2, FAULT="stuck", AT_STEP="3")
    assert result.returncode == 1
    assert "[rank 0] error: another rank did not answer in time (run.timeout_minutes)" in result.stderr


def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(tmp_path: Path):
    """Under torchrun; that it may signal the other rank as well is waited for."""
    fault = {"FAULT": "asked to stop", "AT_STEP": "5", "TORCHELASTIC_RUN_ID": "job"}
    stopped = launch("tests/helpers/faulty_train.py", options(), tmp_path, ranks=2, **fault)
    assert stopped.returncode == 0, stopped.stderr
    epoch, step, again = re.search(
        r"stopped in epoch (\d), after step (\d), and saved; to go on: (.*)", stopped.stdout
    ).groups()
    assert (epoch, step) in {("2", str(step)) for step in range(1, 5)} | {("3", "0")}
    assert again == "the same torchrun command"
    parts = [rank["so_far"] for rank in load_checkpoint(tmp_path / "runs/tiny/last.pt")["ranks"]]
    assert {part and part["step"] for part in parts} == {int(step) or None}


def test_a_batch_of_nan_on_one_rank_is_left_out_on_both(tmp_path: Path):
    fault = {"FAULT": "not finite", "AT_STEP": "6"}
    arguments = options(train__nonfinite="skip")
    result = launch("tests/helpers/faulty_train.py", arguments, tmp_path, ranks=2, **fault)
    assert result.returncode == 0, result.stderr
    log = read_log(tmp_path / "runs/tiny/log.jsonl")
    assert [event["skipped_steps"] for event in log if event["event"] == "epoch"] == [0, 1, 0]
    assert all(len(set(event["digests"])) == 1 for event in log if event["event"] == "resize")
