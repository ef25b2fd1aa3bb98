"""Runs that aim at a speed-up of the step: where they land, and that they go on with the device they began with."""

import json
from pathlib import Path

import pytest
from launching import broken_off, events, launch, options, train

import cup
from train import build
from train.log.rundir import read_log

RATES = dict.fromkeys(cup.KERNELS, cup.Rate(1e10, 1e9))
DEVICE = cup.Device("measured (made up)", "fp32", RATES, 1e-6, 1, "made up", overlap=0.0)

SPEEDUP = {
    "prune__target_reduction": "null", "prune__target_speedup": 1.5, "prune__scope": "all", "train__epochs": 4,
    "prune__last_epoch": 3, "model__name": "mlp",
}  # fmt: skip
RAMPS = {
    "a straight line": {"prune__hard_ramp__kind": "speedup"},
    "thresholds": {"prune__hard_ramp__kind": "threshold", "prune__hard_ramp__offset": 0.9},
}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Nothing is timed; the calls that would have."""
    calls: list[tuple] = []
    monkeypatch.setattr(build, "measured_device", lambda *arguments: calls.append(arguments) or DEVICE)
    return calls


def numbers(log: list[dict]) -> list[list]:
    keys = ("epoch", "train_loss", "top1", "widths", "step_speedup")
    return [[event[key] for key in keys] for event in events(log, "epoch")]


@pytest.mark.parametrize("ramp", list(RAMPS))
def test_the_ramp_stops_within_one_percent_of_the_speed_up(tmp_path: Path, made_up: list[tuple], ramp: str):
    log = train(tmp_path, **(SPEEDUP | RAMPS[ramp]))
    found = [event["step_speedup"] for event in events(log, "epoch")]
    assert found == sorted(found) and found[0] >= 1
    assert 1.5 <= found[2] <= 1.515 and found[3] == found[2]
    if ramp == "a straight line":
        assert found[0] == 1 and found[1] == pytest.approx(1.25, rel=0.011)
    assert [(batch, side) for _, batch, side, _ in made_up] == [(32, 28)]


@pytest.mark.parametrize("method", ["early", "prune_train"])
def test_other_methods_land_on_it_as_well(tmp_path: Path, made_up: list[tuple], method: str):
    changes = {"prune__method": method, "prune__early__patience": 1, "prune__prune_train__below": 10}
    log = train(tmp_path, **(SPEEDUP | changes))
    assert 1.5 <= events(log, "epoch")[-1]["step_speedup"] <= 1.515


def test_a_resumed_run_goes_on_with_the_device_that_was_measured(tmp_path: Path, made_up: list[tuple], monkeypatch):
    settings = SPEEDUP | RAMPS["a straight line"]
    undisturbed = train(tmp_path / "a", **settings)
    with broken_off(monkeypatch, at_step=7):
        train(tmp_path / "b", **settings)
    monkeypatch.setattr(build, "measured_device", lambda *arguments: pytest.fail("measured a second time"))
    assert numbers(train(tmp_path / "b", **settings)) == numbers(undisturbed)


def test_a_device_from_a_file_is_read_once_and_planned_with(tmp_path: Path, made_up: list[tuple], monkeypatch):
    settings = SPEEDUP | RAMPS["a straight line"]
    measured = train(tmp_path / "a", **settings)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"device": DEVICE.to_dict()}))
    settings |= {"prune__device": str(file)}
    monkeypatch.setattr(build, "measured_device", lambda *arguments: pytest.fail("measured"))
    with broken_off(monkeypatch, at_step=7):
        train(tmp_path / "b", **settings)
    file.unlink()
    assert numbers(train(tmp_path / "b", **settings)) == numbers(measured)


def test_a_network_that_starts_at_the_target_is_cut_no_more(tmp_path: Path, made_up: list[tuple]):
    first = train(tmp_path, **(SPEEDUP | RAMPS["a straight line"]))
    last = str(tmp_path / events(first, "run")[0]["directory"] / "last.pt")
    changes = SPEEDUP | RAMPS["a straight line"] | {"model__checkpoint": last, "run__name": "again"}
    log = train(tmp_path, **changes)
    assert not events(log, "resize")
    assert any("prune.target_speedup 1.5 is reached already" in event["message"] for event in events(log, "note"))


def test_two_ranks_decide_alike(tmp_path: Path):
    """A named device: its rates are the same everywhere, and rank 0's plan, which drops blocks, is what both do.

    Launches bound this network there, so only whole blocks save time, each some 8% of it.
    """
    named = {"prune__device": "t4", "prune__target_speedup": 1.2, "prune__drop_blocks": True, "train__epochs": 2}
    images = {"model__name": "resnet20_cifar", "data__channels": 3, "data__image_size": 16, "data__resize_size": 16}
    settings = SPEEDUP | RAMPS["a straight line"] | named | images | {"prune__last_epoch": 2}
    result = launch("launch/train.py", options(**settings), tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    log = read_log(tmp_path / "runs/tiny/log.jsonl")
    assert 1.2 <= events(log, "epoch")[-1]["step_speedup"] <= 1.3
    assert any("blocks dropped: layer" in event["message"] for event in events(log, "note"))
    for resize in events(log, "resize"):
        assert len(set(resize["digests"])) == 1 and len(resize["digests"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_speedup": 0.9}, "target_speedup: found 0.9, allowed: a number above 1"),
        ({"target_speedup": 1.5, "target_reduction": 2.0}, "null beside target_reduction 2.0"),
        (
            {"target_reduction": 2.0, "drop_blocks": True},
            "drop_blocks: found True, allowed: false without target_speedup",
        ),
        ({"device": "h1000"}, "device: found 'h1000', allowed: measured, h100-sxm"),
        ({"target_speedup": 1.5, "method": "soft_rate"}, "allowed with soft_rate: null"),
    ],
)
def test_settings_that_conflict_are_refused(changes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        build.PruneConfig(**changes)


def test_a_ramp_in_speed_up_needs_its_target_and_a_device_the_precision(tmp_path: Path):
    with pytest.raises(Exception, match=r"target_speedup: found None.*kind: speedup needs it"):
        train(tmp_path, prune__hard_ramp__kind="speedup")
    changes = SPEEDUP | RAMPS["a straight line"] | {"prune__device": "titan-xp", "train__precision": "bf16"}
    with pytest.raises(Exception, match=r"prune\.device: found titan-xp, which has no rates in train.precision bf16"):
        train(tmp_path, **changes)
