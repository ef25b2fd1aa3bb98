"""Networks that are narrow from their first step: shapes, FR, checkpoints, resume, labels, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from launching import broken_off, events, numbers, train, write_network

import cup
from launch import evaluate, prune
from launch.reports.read import group_runs, read_run
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import load_network
from train.errors import ConfigError
from train.network.models import build_model

DENSE = {"prune__method": "none", "train__epochs": 2}
RESNET = {"model__name": "resnet18", "data__channels": 3, "data__image_size": 32, "data__resize_size": 32}


def widths_of(path: Path) -> dict[str, int]:
    network = load_network(path)
    return {
        group.name: group.width for group in cup.channel_groups(network.model, network.architecture.example_input())
    }


def test_a_uniformly_thinner_network_is_measured_against_the_full_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    log = train(tmp_path, **DENSE, model__width=0.6)
    full = cup.complexity(build_model("lenet", 10), torch.zeros(1, 1, 28, 28))
    assert widths_of(tmp_path / "tiny/last.pt") == {"conv1": 12, "conv2": 30, "fc1": 300, "fc2": 10}
    thin = load_network(tmp_path / "tiny/best.pt")
    reduction = full.flops / cup.complexity(thin.model, torch.zeros(1, 1, 28, 28)).flops
    assert [event["flops_reduction"] for event in events(log, "epoch")] == [pytest.approx(reduction)] * 2
    assert reduction > 2 and thin.dense == full
    run = read_run(tmp_path / "tiny")
    assert run.method == "uniformly thinner, width 0.6" and not run.is_dense
    note = f"uniformly thinner, width 0.6: lenet at FR {reduction:.2f}"
    assert note in [event["message"] for event in events(log, "note")]
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "tiny/last.pt")]) == 0
    assert f"top-1 {log[-1]['top1']:.3f}%" in capsys.readouterr().out


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_residual_streams_are_thinner_only_with_their_scope(tmp_path: Path, scope: str):
    settings = DENSE | RESNET | {"train__epochs": 1, "data__synthetic_images": 32}
    log = train(tmp_path, **settings, model__width=0.5, prune__scope=scope)
    widths = widths_of(tmp_path / "tiny/last.pt")
    assert widths["layer1.0.conv1"] == 32 and widths["conv1"] == (32 if scope == "all" else 64)
    assert not any("prune.scope" in note["message"] for note in events(log, "note"))
    assert read_run(tmp_path / "tiny").settings["prune.scope"] == scope, "runs that differ in it are no repetitions"


def test_the_shape_that_a_method_ended_with_is_trained_from_scratch(tmp_path: Path):
    train(tmp_path / "cut")
    last = tmp_path / "cut/tiny/last.pt"
    train(tmp_path, **DENSE, model__widths=last)
    train(tmp_path / "full", **DENSE)
    own = tmp_path / "tiny/last.pt"
    assert widths_of(own) == widths_of(last) != widths_of(tmp_path / "full/tiny/last.pt")
    [plan] = load_network(own).plans
    assert all(kept == tuple(range(len(kept))) for kept in plan.kept.values())
    runs = [read_run(folder / "tiny") for folder in (tmp_path, tmp_path / "full", tmp_path / "cut")]
    assert [run.method for run in runs] == [f"from scratch at the widths of {last}", "dense", "CUP-SS"]
    assert [run.is_dense for run in runs] == [False, True, False]
    assert len(group_runs(runs)) == 3


def test_the_weights_are_fresh_ones(tmp_path: Path):
    """At a learning rate of next to nothing they stay those of the full network that the seed gives."""
    (tmp_path / "widths.yaml").write_text("conv1: 5\nfc1: 90\n")
    still = {"optim__lr": 1e-12, "optim__weight_decay": 0, "train__epochs": 1}
    train(tmp_path, **(DENSE | still), model__widths=tmp_path / "widths.yaml", train__ema_decay=0.9)
    torch.manual_seed(0)
    full = build_model("lenet", 10)
    stored = load_checkpoint(tmp_path / "tiny/last.pt")
    for weights, prefix in ((stored["model"], ""), (stored["ema"], "module.")):
        assert torch.allclose(weights[f"{prefix}conv1.weight"], full.conv1.weight[:5], atol=1e-6)
        assert torch.allclose(weights[f"{prefix}fc1.weight"], full.fc1.weight[:90], atol=1e-6)


@pytest.mark.parametrize("at_step", [2, 6, 11])
def test_a_narrow_run_that_shrinks_on_goes_on_without_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
):
    monkeypatch.setattr("train.loop.watch.MAX_STEPS", 1)
    file = tmp_path / "widths.json"
    settings = {"model__widths": file, "run__save_every_minutes": 1e-9}
    file.write_text(json.dumps({"conv2": 40}))
    undisturbed = train(tmp_path / "a", **settings)
    with broken_off(monkeypatch, at_step):
        train(tmp_path / "b", **settings)
    file.unlink()
    again = train(tmp_path / "b", **settings)
    assert numbers(again) == numbers(undisturbed)
    assert undisturbed[-1]["flops_reduction"] == pytest.approx(2, rel=0.01)
    plans = load_network(tmp_path / "b/tiny/last.pt").plans
    assert plans[0].kept["conv2"] == tuple(range(40)) and len(plans) > 1
    assert read_run(tmp_path / "b/tiny").method == f"CUP-SS, from scratch at the widths of {file}"


def test_what_holds_no_widths_for_the_network_is_one_line(tmp_path: Path):
    write_network(tmp_path / "full.pt")
    write_network(tmp_path / "other.pt", "mlp")
    assert prune.main([str(tmp_path / "other.pt"), "--reduction", "2", "--out", str(tmp_path / "mlp.pt")]) == 0
    (tmp_path / "unknown.yaml").write_text("conv9: 5\n")
    (tmp_path / "wide.yaml").write_text("conv1: 21\n")
    (tmp_path / "logits.yaml").write_text("fc2: 3\n")
    (tmp_path / "empty.yaml").write_text("")
    os.mkfifo(tmp_path / "pipe")  # opened plainly, it would wait for a writer
    named = ("full.pt", "mlp.pt", "unknown.yaml", "wide.yaml", "logits.yaml")  # the others are files of counts anywhere
    for name, words in {
        "full.pt": "full network, which was never cut",
        "mlp.pt": "holds mlp, allowed: a checkpoint of lenet",
        "unknown.yaml": "no channel group 'conv9'",
        "wide.yaml": "width of conv1: found 21, allowed: 1 to 20",
        "logits.yaml": "fc2 must keep its width",
        "empty.yaml": "found no counts",
        "missing.yaml": "cannot read",
        "pipe": "cannot read .*: not a regular file",
    }.items():
        with pytest.raises(ConfigError, match=f"model.widths.*{words}" if name in named else words):
            train(tmp_path / "runs", **DENSE, model__widths=tmp_path / name)
    assert not (tmp_path / "runs").exists()
