"""The measurements run, name their peers, and notice a network that is not what it should be."""

import copy
import json

import pytest
from launching import ROOT

from launch.bench import main
from launch.benches import models
from launch.benches.measure import machine, rounds_in_turn


def test_a_resize_is_measured_beside_its_peers_and_written_with_the_machine(tmp_path, capsys):
    pytest.importorskip("torch_pruning")
    out = tmp_path / "results" / "resize.json"
    assert main(["resize", "--model", "resnet20_cifar", "--rounds", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["ranks"], result["model"]) == (1, "resnet20_cifar")
    assert {"cpu", "cores", "python", "torch"} <= set(result["machine"])
    for peer in ("reference", "torch-pruning", "everything"):
        assert any(peer in name for name in result["seconds"])
    for times in result["seconds"].values():
        assert len(times["runs"]) == 1
        assert 0 < times["min"] <= times["median"] <= times["max"]
    assert "resnet20_cifar, one cut to FR 2.2" in capsys.readouterr().out


def test_networks_go_through_all_of_the_library(tmp_path, capsys):
    out = tmp_path / "models.json"
    assert main(["models", "--models", "resnet20_cifar", "lenet", "--reduction", "1.5", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["resnet20_cifar", "lenet"]
    for row in rows:
        assert row["failure"] == ""
        assert row["reached"] == pytest.approx(1.5, rel=0.02)
        assert row["twin_difference"] < models.TWIN_TOLERANCE
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 pass, 2 reach FR 1.5"


def test_a_network_that_differs_from_its_twin_does_not_pass(monkeypatch):
    monkeypatch.setattr(models, "_masked_twin", lambda model, groups, plan: copy.deepcopy(model))
    assert "differs from its masked twin" in models.run_model("resnet20_cifar", 1.5, "inner").failure


def test_a_network_that_breaks_is_a_row_and_not_the_end(monkeypatch):
    def broken(name):
        raise RuntimeError("no such\nlayer")

    monkeypatch.setattr(models, "_build", broken)
    assert models.run_model("lenet", 1.5, "inner").failure == "RuntimeError: no such layer"


def test_contenders_take_turns_after_a_round_of_warm_up():
    calls = []
    contenders = {name: lambda name=name: float(calls.append(name) or len(calls)) for name in "ab"}
    assert rounds_in_turn(contenders, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert "".join(calls) == "ababab"


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["speed"], "speed"),
        (["models", "--models", "resnet1"], "resnet1"),
        (["resize", "--rounds", "0"], "--rounds"),
        (["resize", "--model", "lenet", "--rounds", "1", "--out", f"{ROOT}/README.md/x.json"], "README.md"),
    ],
)
def test_a_wrong_command_is_one_line(argv, word, capsys):
    assert main(argv) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_a_loader_bench_on_anything_but_an_image_folder_is_one_line(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("a.jpg ant\n")
    assert main(["loader", "--data", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "found file lists, allowed: an image folder" in line


def test_versions_are_found_however_a_package_spells_its_name():
    versions = machine("Pillow", "no-such-package")
    assert versions["Pillow"] and versions["Pillow"] == machine("pillow")["pillow"]
    assert versions["no-such-package"] is None
