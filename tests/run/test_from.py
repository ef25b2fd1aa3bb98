"""Runs that start from a checkpoint (`model.from`): widths, weights, hours, resume, and what is refused."""

from pathlib import Path

import pytest
import torch
from launching import ALONE, broken_off, events, train, write_network

import cup
from launch import prune
from train.checkpoint.file import CheckpointError, load_checkpoint, save_checkpoint
from train.checkpoint.network import load_network
from train.errors import ConfigError
from train.evaluate import evaluate_stored

NAMED_BY_THE_FILE = {"model__name": "null"}
DENSE = {"prune__method": "none"}


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """An untrained LeNet of 10 classes after one cut; 2 GPU hours went into it."""
    write_network(tmp_path / "full.pt", seed=3)
    assert prune.main([str(tmp_path / "full.pt"), "--t", "0.2", "--out", str(tmp_path / "cut.pt")]) == 0
    return tmp_path / "cut.pt"


@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_training_goes_on_from_the_widths_and_weights_of_the_file(tmp_path: Path, cut: Path, ema_decay: float):
    """At a learning rate of next to nothing the weights stay what they were, the moving average's too."""
    log = train(
        tmp_path, model__checkpoint=cut, **NAMED_BY_THE_FILE, **DENSE, train__epochs=1, train__ema_decay=ema_decay,
        optim__lr=1e-12, optim__weight_decay=0,
    )  # fmt: skip
    source, trained = load_network(cut), load_network(tmp_path / "tiny/last.pt")
    stored = load_checkpoint(tmp_path / "tiny/last.pt")
    for key, tensor in source.model.state_dict().items():
        assert torch.allclose(trained.model.state_dict()[key], tensor, atol=1e-6)
        assert torch.allclose(stored["model"][key], tensor, atol=1e-6)
    assert [plan.digest() for plan in trained.plans] == [plan.digest() for plan in source.plans]
    reduction = source.dense.flops / cup.complexity(source.model, source.architecture.example_input()).flops
    (epoch,) = events(log, "epoch")
    assert epoch["flops_reduction"] == pytest.approx(reduction) and reduction > 1.5
    assert epoch["widths"] == source.plans[0].new_widths
    assert log[0]["from"] == str(cut) and log[0]["model"] == "lenet"
    assert f"starts from {cut}: lenet at FR {reduction:.2f}" in [note["message"] for note in events(log, "note")]


def test_the_moving_average_of_a_run_is_what_another_starts_from(tmp_path: Path):
    train(tmp_path / "first", **DENSE, train__epochs=1, train__ema_decay=0.9)
    last = tmp_path / "first/tiny/last.pt"
    train(tmp_path, model__checkpoint=last, **DENSE, train__epochs=1, optim__lr=1e-12, optim__weight_decay=0)
    average = load_checkpoint(last)["ema"]["module.fc1.weight"]
    assert torch.allclose(load_checkpoint(tmp_path / "tiny/last.pt")["model"]["fc1.weight"], average, atol=1e-6)


def test_the_hours_before_are_logged_and_add_up_over_cuts(tmp_path: Path, cut: Path):
    log = train(tmp_path, model__checkpoint=cut, **DENSE, train__epochs=1)
    own = events(log, "epoch")[-1]["gpu_hours"]
    assert log[0]["gpu_hours_before"] == 2.0
    assert own < 0.1  # the log's hours are the run's own
    last = tmp_path / "tiny/last.pt"
    assert load_network(last).gpu_hours == pytest.approx(2.0 + own, abs=1e-3)
    assert load_network(last).gpu_hours >= 2.0 + own
    assert prune.main([str(last), "--t", "0.4", "--out", str(tmp_path / "again.pt")]) == 0
    assert load_network(tmp_path / "again.pt").gpu_hours == load_network(last).gpu_hours


def test_hours_that_nobody_knows_stay_unknown(tmp_path: Path):
    torch.save(write_network(tmp_path / "full.pt").model.state_dict(), tmp_path / "weights.pth")
    arguments = ["--weights", str(tmp_path / "weights.pth"), "--t", "0.2", "--out", str(tmp_path / "cut.pt")]
    assert prune.main(["lenet", *arguments]) == 0
    log = train(tmp_path, model__checkpoint=tmp_path / "cut.pt", **DENSE, train__epochs=1)
    assert log[0]["gpu_hours_before"] is None
    assert load_network(tmp_path / "tiny/last.pt").gpu_hours is None


def test_an_interrupted_run_goes_on_without_the_file_that_it_started_from(
    tmp_path: Path, cut: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"model__checkpoint": cut, **NAMED_BY_THE_FILE, "prune__target_reduction": "null"}
    changes |= {"prune__hard_ramp__kind": "threshold", "prune__hard_ramp__slope": 0.05, "prune__hard_ramp__offset": 0.2}
    undisturbed = train(tmp_path / "a", **changes)
    with broken_off(monkeypatch, at_step=10):
        train(tmp_path / "b", **changes)
    cut.unlink()
    resumed = train(tmp_path / "b", **changes)
    assert len(events(undisturbed, "resize")) > 1 and len(events(resumed, "epoch")) == 3
    same = ("train_loss", "top1", "flops", "widths")
    assert [[e[k] for k in same] for e in events(resumed, "epoch")] == [
        [e[k] for k in same] for e in events(undisturbed, "epoch")
    ]
    assert events(resumed, "run")[-1]["gpu_hours_before"] == 2.0
    assert events(resumed, "run")[-1]["model"] == "lenet"


def test_cup_ss_goes_on_cutting_and_reaches_its_target_of_the_full_network(tmp_path: Path, cut: Path):
    log = train(tmp_path, model__checkpoint=cut, prune__target_reduction=4, prune__every=2)
    source = load_network(cut)
    reached = events(log, "epoch")[-1]["flops_reduction"]
    assert log[-1]["dense_flops"] == source.dense.flops
    assert reached == pytest.approx(4, rel=0.01)
    assert events(log, "resize")[0]["flops_reduction_before"] > 1.5
    assert len(load_network(tmp_path / "tiny/last.pt").plans) == 1 + len(events(log, "resize"))
    outcome = evaluate_stored(tmp_path / "tiny/last.pt", ALONE)
    assert outcome.evaluation.top1 == events(log, "epoch")[-1]["top1"]
    assert source.dense.flops / outcome.cost["flops"] == reached


def test_a_target_that_the_file_has_reached_already_is_said_to_cut_nothing(tmp_path: Path, cut: Path):
    log = train(tmp_path, model__checkpoint=cut, prune__target_reduction=1.2, train__epochs=1, prune__last_epoch=1)
    assert not events(log, "resize")
    assert any("1.2 is reached already" in note["message"] for note in events(log, "note"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model__name": "mlp"}, ConfigError, r"model\.name: found mlp, but .*cut\.pt holds lenet"),
        ({"data__synthetic_classes": 7}, ConfigError, r"model\.checkpoint: .*cut\.pt has 10 classes.* 7"),
        ({"model__checkpoint": "missing.pt"}, CheckpointError, r"no file at missing\.pt"),
    ],
)
def test_what_cannot_be_started_from_is_an_error_and_leaves_no_run_directory(
    tmp_path: Path, cut: Path, changes: dict, error: type, words: str
):
    with pytest.raises(error, match=words):
        train(tmp_path / "runs", **{"model__checkpoint": cut, **changes})
    assert not (tmp_path / "runs").exists()


def test_a_file_whose_weights_are_another_network_s_is_refused(tmp_path: Path, cut: Path):
    content = load_checkpoint(cut)
    del content["model"]["fc1.bias"]
    save_checkpoint(cut, content)
    with pytest.raises(CheckpointError, match=r"missing: fc1\.bias"):
        train(tmp_path / "runs", model__checkpoint=cut)
    assert not (tmp_path / "runs").exists()


def test_the_run_directory_names_the_network_that_the_file_named(tmp_path: Path, cut: Path):
    train(tmp_path, model__checkpoint=cut, **NAMED_BY_THE_FILE, **DENSE, train__epochs=1)
    assert f"name: lenet\n  checkpoint: {cut}" in (tmp_path / "tiny/config.yaml").read_text()
