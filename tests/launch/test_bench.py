"""The measurements run, name their peers, and notice a network that is not what it should be."""

import argparse
import copy
import json
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from launching import ALONE, ROOT
from torch import nn

import cup
from launch.bench import main
from launch.benches import cost, models, rates, savings, step, targets
from launch.benches.measure import machine, rounds_in_turn
from launch.projections.schedule import Costs
from train.loop.config import TrainConfig
from train.network.calibration import known_device
from train.network.models import build_model


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


def test_a_checkpoint_is_measured_as_what_training_waits_for_and_what_the_thread_writes(tmp_path, capsys):
    out = tmp_path / "checkpoint.json"
    asked = ["--model", "resnet20_cifar", "--rounds", "1", "--folder", str(tmp_path), "--out", str(out)]
    assert main(["checkpoint", *asked]) == 0
    result = json.loads(out.read_text())
    assert len(result["seconds"]) == 3 and result["bytes"] > 3 * 4 * 270_000  # weights, average, momentum
    assert "training waits" in capsys.readouterr().out
    assert not list(tmp_path.glob("tmp*"))


def test_networks_go_through_all_of_the_library(tmp_path, capsys):
    out = tmp_path / "models.json"
    assert main(["models", "--models", "resnet20_cifar", "lenet", "--reduction", "1.5", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["resnet20_cifar", "lenet"]
    for row in rows:
        assert row["failure"] == ""
        assert row["reached"] == pytest.approx(1.5, rel=0.02)
        assert max(row[f"{what}_difference"] for what in ("twin", "eval", "step")) < models.TWIN_TOLERANCE
        assert row["round_trip"]
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 pass, 2 reach FR 1.5"


def test_a_table_of_networks_goes_on_where_it_was_left(tmp_path, capsys, monkeypatch):
    out = tmp_path / "models.json"
    asked = ["--reduction", "1.5", "--out", str(out), "--resume", str(out)]
    assert main(["models", "--models", "lenet", *asked[:-2]]) == 0
    ran = []
    monkeypatch.setattr(models, "run_model", lambda name, *_: ran.append(name) or models.Row(name))
    assert main(["models", "--models", "lenet", "mlp", *asked]) == 0
    assert ran == ["mlp"]
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["lenet", "mlp"]
    assert main(["models", "--models", "mlp", *asked, "--scope", "all"]) == 1
    assert "asked for" in capsys.readouterr().err


def test_torch_pruning_stands_beside_us(tmp_path, capsys):
    pytest.importorskip("torch_pruning")
    out = tmp_path / "models.json"
    asked = ["models", "--models", "lenet", "--reduction", "1.3", "--out", str(out)]
    assert main(asked) == 0
    assert main([*asked, "--resume", str(out), "--rival", "torch-pruning"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["rival"]["outcome"] == "passes" and row["rival"]["reached"] >= 1.3
    assert f"{row['rival']['reached']:.2f} in " in capsys.readouterr().out


def test_what_torch_pruning_breaks_or_does_otherwise_is_said(monkeypatch):
    pytest.importorskip("torch_pruning")
    network = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    monkeypatch.setattr(models.networks, "build", lambda name: (copy.deepcopy(network), torch.randn(2, 8)))
    assert models.run_rival("lenet", 1.5)["outcome"] == "passes"
    prune = models.rival.prune

    def wrongly(model, *arguments):
        seconds = prune(model, *arguments)
        model[3].weight.data = network[3].weight.data.double()[: len(model[3].weight), -len(model[0].weight) :]
        return seconds

    monkeypatch.setattr(models.rival, "prune", wrongly)
    assert models.run_rival("lenet", 1.5)["outcome"] == "differs"
    monkeypatch.setattr(models.rival, "LONGEST_S", 0.001)
    monkeypatch.setattr(models.rival, "prune", prune)
    assert "TimeoutError" in models.run_rival("lenet", 1.5)["why"]


def test_a_network_that_differs_from_its_twin_does_not_pass(monkeypatch):
    monkeypatch.setattr(models, "silence", lambda model, groups, kept: model)
    assert "differs from its masked twin in training" in models.run_model("resnet20_cifar", 1.5, "inner").failure


def test_a_network_whose_momentum_is_lost_does_not_pass(monkeypatch):
    monkeypatch.setattr(models.cup, "carry_optimizer", lambda optimizer, resized: optimizer.state.clear())
    assert "in a step" in models.run_model("resnet20_cifar", 1.5, "inner").failure


def test_a_network_that_breaks_is_a_row_and_not_the_end(monkeypatch):
    def broken(name):
        raise RuntimeError("no such\nlayer")

    monkeypatch.setattr(models.networks, "build", broken)
    assert models.run_model("lenet", 1.5, "inner").failure == "RuntimeError: no such layer"


def test_contenders_take_turns_after_a_round_of_warm_up():
    calls = []
    contenders = {name: lambda name=name: float(calls.append(name) or len(calls)) for name in "ab"}
    assert rounds_in_turn(contenders, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert "".join(calls) == "ababab"


# --- step and savings ---

DENSE = {"conv1": 20, "conv2": 50, "fc1": 500}
CUT = {"conv1": 11, "conv2": 27, "fc1": 300}
DEEP = {"conv1": 9, "conv2": 17, "fc1": 100}


@pytest.fixture
def lenet_run(tmp_path):
    """The log of a run of LeNet on two ranks: five epochs, two resizes."""
    events = [{"event": "run", "model": "lenet", "world_size": 2}]
    for epoch, widths in enumerate([DENSE, CUT, CUT, DEEP, DEEP], start=1):
        if epoch in (2, 4):
            events.append({"event": "resize", "epoch": epoch, "seconds": epoch / 4})
        events.append({"event": "epoch", "epoch": epoch, "widths": widths})
    events.append({"event": "done"})
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


QUICK = ["--classes", "10", "--rounds", "1"]


def test_steps_at_the_widths_of_a_run_stand_beside_the_dense_network_and_the_loops(lenet_run, tmp_path, capsys):
    out = tmp_path / "step.json"
    assert main(["step", "--run", str(lenet_run), "--round-to", "1", "16", *QUICK, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["networks"]}
    assert list(rows) == [
        *("dense", "from epoch 2", "from epoch 4"),
        *("from epoch 2, round_to 16", "from epoch 4, round_to 16"),
    ]
    assert rows["from epoch 2"]["widths"] == CUT
    assert rows["from epoch 4, round_to 16"]["widths"] == {"conv1": 16, "conv2": 32, "fc1": 112}
    dense = cup.complexity(build_model("lenet", 10), torch.empty(1, 1, 28, 28)).flops
    cut = build_model("lenet", 10)
    cup.shrink_to(cut, DEEP, torch.empty(1, 1, 28, 28))
    row = rows["from epoch 4"]
    assert row["flops_reduction"] == pytest.approx(dense / cup.complexity(cut, torch.empty(1, 1, 28, 28)).flops)
    assert row["speed_up"]["median"] == pytest.approx(rows["dense"]["step_s"]["median"] / row["step_s"]["median"])
    assert row["speed_up_over_fr"] == pytest.approx(row["speed_up"]["median"] / row["flops_reduction"])
    assert set(result["loops_s"]) == {step.OUR_LOOP, step.BARE_LOOP, step.TORCHVISION_LOOP}
    assert all(seconds["min"] > 0 for seconds in result["loops_s"].values())
    assert "from epoch 4" in capsys.readouterr().out


def test_steps_are_measured_at_a_planned_reduction_on_the_widths_that_are_worth_having(tmp_path, monkeypatch, capsys):
    allowed = {"conv1": [5, 13, 20], "conv2": [11, 29, 50], "fc1": [70, 130, 330, 500]}
    monkeypatch.setattr(step, "measured_widths", lambda *args: (allowed, ["conv1"]))
    out = tmp_path / "step.json"
    argv = ["step", "--model", "lenet", "--reduction", "2", "--round-to", "measured", *QUICK, "--out", str(out)]
    assert main(argv) == 0
    assert "the times of 1 of 3 layers do not repeat" in capsys.readouterr().out
    _, row = json.loads(out.read_text())["networks"]
    assert row["flops_reduction"] == pytest.approx(2, rel=0.2)
    assert all(width in allowed[name] for name, width in row["widths"].items())


def test_every_loop_takes_all_steps_of_every_round(monkeypatch):
    """A loader goes on where it was left: a loop that found none left would look infinitely fast."""
    bench = step.StepBench("lenet", 10, None, 4, TrainConfig(), ALONE)
    loops, batches = step._Loops(bench, steps=3), []
    entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: batches.append(1) or entropy(*args, **kwargs))
    for loop in (loops.ours, loops.bare, loops.torchvision_style) * 2:
        batches.clear()
        assert loop() > 0
        assert len(batches) == 3
    loops.close()


def test_the_bare_loop_learns_what_ours_does():
    """The same work: from equal weights and batches, equal weights after an epoch."""
    torch.manual_seed(0)
    bench = step.StepBench("lenet", 10, None, 4, TrainConfig(), ALONE)
    loops = step._Loops(bench, steps=3)
    bare, *_ = loops.networks[step.MEMORY_FORMAT]
    bare.load_state_dict(loops.loop.state.model.state_dict())
    loops.ours()
    loops.bare()
    loops.close()
    for one, other in zip(loops.loop.state.model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_timed_is_told_for_a_single_step(monkeypatch):
    """On a clock by which everything takes six seconds; each of these makes several steps, batches or copies."""
    monkeypatch.setattr(step, "timed", lambda work, world: (work(), 6.0)[1])
    monkeypatch.setattr(step.StepBench, "_repeats", 3)
    bench = step.StepBench("lenet", 10, None, 4, TrainConfig(), ALONE)
    state, modes = bench.state({}), []
    state.model.register_forward_hook(lambda model, *_: modes.append((model.training, torch.is_grad_enabled())))
    before = copy.deepcopy(state.model.state_dict())
    assert bench.forward_timer(state, 3)() == 2.0
    assert modes == [(False, False)] * 3 and state.model.training
    torch.testing.assert_close(state.model.state_dict(), before)
    modes.clear()
    assert bench.step_timer(state, 3)() == 2.0
    assert modes == [(True, True)] * 3
    assert not torch.equal(state.model.state_dict()["conv1.weight"], before["conv1.weight"])
    assert bench.matmul_seconds() == bench.copy_seconds() == 2.0
    loops = step._Loops(bench, steps=3)
    assert loops.ours() == loops.bare() == loops.torchvision_style() == 2.0
    loops.close()


def test_the_rates_and_ratios_of_a_measurement(lenet_run, tmp_path, monkeypatch, capsys):
    """Three rounds of given seconds: medians, ratios round by round, and the device's best rate."""
    given = {
        **{"dense": [2.0, 4.0, 12.0], "from epoch 2": [1.0, 1.0, 3.0], "from epoch 4": [1.0, 1.0, 1.0]},
        **{step.OUR_LOOP: [3.0, 6.0, 8.8], step.BARE_LOOP: [2.0, 5.0, 8.0], step.TORCHVISION_LOOP: [4.0, 10.0, 8.0]},
        **{"matmul": [0.5, 0.25, 1.0], "copy": [0.5, 0.125, 1.0]},
    }
    monkeypatch.setattr(step, "rounds_in_turn", lambda contenders, rounds: {name: given[name] for name in contenders})
    out = tmp_path / "step.json"
    arguments = ["--batch-size", "4", "--classes", "10", "--out", str(out)]
    assert main(["step", "--run", str(lenet_run), *arguments]) == 0
    result = json.loads(out.read_text())
    assert result["over_bare_loop"][step.OUR_LOOP]["runs"] == pytest.approx([1.5, 1.2, 1.1])
    assert result["over_bare_loop"][step.TORCHVISION_LOOP]["runs"] == [2.0, 2.0, 1.0]
    assert "20.00 (10.00 to 50.00) %" in capsys.readouterr().out
    matmul, moved = 2 * 1024**3 / 0.25, 2 * 128 * 2**20 / 0.125
    assert (result["matmul_flops_per_s"], result["copy_bytes_per_s"]) == (matmul, moved)
    dense, first, _ = result["networks"]
    assert first["speed_up"]["runs"] == [2.0, 4.0, 4.0]
    assert (dense["step_s"]["median"], dense["images_per_s"]) == (4.0, 1.0)
    assert dense["share_of_matmul"] == pytest.approx(3 * 2 * dense["macs"] * 4 / 4.0 / matmul)


def test_the_bytes_of_a_step_are_those_of_its_layers_and_of_the_optimizer():
    bench = step.StepBench("lenet", 10, None, 4, TrainConfig(), ALONE)
    ins = [1 * 28 * 28, 20 * 12 * 12, 50 * 4 * 4, 500]
    outs = [20 * 24 * 24, 50 * 8 * 8, 500, 10]
    params = sum(parameter.numel() for parameter in bench.model.parameters())
    assert bench._bytes({}) == 4 * 4 * (3 * sum(ins) + 2 * sum(outs)) + 5 * 4 * params
    half = {"conv1": 10, "conv2": 50, "fc1": 500}
    fewer = 3 * 10 * 12 * 12 + 2 * 10 * 24 * 24
    assert bench._bytes({}) - bench._bytes(half) == 4 * 4 * fewer + 20 * (params - bench.cost(half).params)


def test_the_epochs_of_a_run_are_spread_over_a_schedule_in_proportion():
    assert savings.spread("abc", 9) == list("aaabbbccc")
    assert savings.spread("abc", 7) == list("aaabbcc")
    assert savings.spread("abcdef", 3) == list("ace")


class GivenBench:
    """Its networks are their widths; a first step takes ten times the seconds of the others, evaluation a tenth."""

    world = ALONE

    def __init__(self, seconds: dict[int, list[float]]):
        self.seconds = seconds
        self.turns: list[tuple[str, int]] = []

    def state(self, widths):
        return widths["conv1"]

    def _timer(self, what, state, factor):
        rounds = iter([99.0, *self.seconds[state]])  # the first one is the warm-up
        return lambda: self.turns.append((what, state)) or factor * next(rounds)

    def step_timer(self, state, steps=None):
        return self._timer("step", state, 1) if steps else lambda: 10 * median(self.seconds[state])

    def forward_timer(self, state, batches=None):
        return self._timer("val", state, 0.1)


def test_every_network_of_a_path_is_measured_once_in_turn_and_its_median_counts():
    bench = GivenBench({20: [2.0, 8.0, 4.0], 10: [1.0, 3.0, 1.5]})
    path = [{"conv1": 20}, {"conv1": 20}, {"conv1": 10}]
    costs = savings._measured(bench, path, argparse.Namespace(rounds=3))
    assert bench.turns == [("step", 20), ("val", 20), ("step", 10), ("val", 10)] * 4
    assert costs.medians(path[0]) == Costs(step_s=4.0, val_s=0.4, first_s=40.0)
    assert costs.medians(path[2]) == Costs(step_s=1.5, val_s=pytest.approx(0.15), first_s=15.0)
    assert costs.of_round(1)(path[2]) == Costs(3.0, pytest.approx(0.3), 15.0)


def test_a_projection_counts_each_resize_and_each_slow_first_step(lenet_run, tmp_path, monkeypatch):
    """5 epochs of 8 steps and 2 validation batches, with given costs: a resize takes 1.5 s of both ranks."""
    costs = {20: Costs(4.0, 1.0, 9.0), 11: Costs(2.0, 0.5, 5.0), 9: Costs(1.0, 0.25, 3.0)}
    given = savings._Measured({}, {}, {})
    monkeypatch.setattr(savings, "_measured", lambda *arguments: given)
    monkeypatch.setattr(savings._Measured, "medians", lambda self, widths: costs[widths["conv1"]])
    monkeypatch.setattr(savings._Measured, "of_round", lambda self, number: self.medians)
    out = tmp_path / "savings.json"
    argv = ["--images", "40", "--val-images", "10", "--batch-size", "10", "--measure-batch-size", "5", "--epochs", "5"]
    assert main(["savings", "--run", str(lenet_run), *argv, *QUICK, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    dense_s = 5 * (8 * 4.0 + 2 * 1.0) + 5.0
    shrunk_s = 34.0 + 5.0 + 2 * (8 * 2.0 + 2 * 0.5) + 3.0 + 1.5 + 2 * (8 * 1.0 + 2 * 0.25) + 2.0 + 1.5
    [row] = result["rows"]
    assert (3600 * result["dense_hours"], 3600 * row["hours"]) == pytest.approx((dense_s, shrunk_s))
    assert row["saving"] == pytest.approx(100 * (1 - shrunk_s / dense_s))


def test_a_projection_adds_up_and_says_that_it_is_one(lenet_run, tmp_path, capsys):
    out = tmp_path / "savings.json"
    argv = ["savings", "--run", str(lenet_run), "--images", "5000", "--val-images", "500", "--epochs", "10"]
    argv += ["--measure-batch-size", "4", "--round-to", "1", "16", *QUICK, "--out", str(out)]
    assert main(argv) == 0
    result = json.loads(out.read_text())
    assert [row["widths"] for row in result["rows"]] == ["round_to 1", "round_to 16"]
    assert result["resize_s"] == pytest.approx(2 * (0.5 + 1.0) / 2), "both ranks wait for a resize"
    parts = result["segments"]["round_to 1"]
    assert [(part["first"], part["last"]) for part in parts] == [(1, 2), (3, 6), (7, 10)]
    hours = sum(p["steps"] * p["step_s"] + p["val_steps"] * p["val_s"] + p["resize_s"] for p in parts) / 3600
    row = result["rows"][0]
    assert row["hours"] == pytest.approx(hours)
    assert row["saving"] == pytest.approx(100 * (1 - hours / result["dense_hours"]))
    assert row["savings_by_round"] == pytest.approx([row["saving"]]), "of one round"
    assert row["saving_if_time_were_flops"] == pytest.approx(100 * (1 - 1 / parts[-1]["flops_reduction"]))
    dense_s = result["segments"]["dense"][0]["step_s"]
    assert row["saving_at_the_final_step"] == pytest.approx(100 * (1 - parts[-1]["step_s"] / dense_s))
    in_steps = sum(p["steps"] * p["step_s"] for p in parts) / (sum(p["steps"] for p in parts) * dense_s)
    assert row["saving_in_steps"] == pytest.approx(100 * (1 - in_steps))
    printed = capsys.readouterr().out
    assert "A projection, not a training" in printed
    assert "epochs   3 to   6" in printed


@pytest.mark.parametrize("round_to", [8, {"conv1": [4, 12, 16], "conv2": [8, 24, 40], "fc1": [100, 200, 250]}])
def test_rounded_widths_can_be_brought_back_to_the_reduction_that_they_had(round_to):
    bench = step.StepBench("lenet", 10, None, 1, TrainConfig(), ALONE)
    free = bench.cost(CUT).flops
    rounded, equal = bench.rounded(CUT, round_to), savings.at_equal_reduction(bench, CUT, round_to)
    assert equal == bench.rounded(equal, round_to), "these are widths that rounding gives"
    assert bench.cost(rounded).flops > free
    assert abs(bench.cost(equal).flops - free) < abs(bench.cost(rounded).flops - free)


def test_a_projection_needs_a_finished_run_that_shrank(lenet_run, capsys):
    log = lenet_run / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"done"' not in line))
    assert main(["savings", "--run", str(lenet_run)]) == 1
    assert "is not finished" in capsys.readouterr().err
    log.write_text("".join(line for line in lines if '"resize"' not in line))
    assert main(["savings", "--run", str(lenet_run)]) == 1
    assert "never shrank" in capsys.readouterr().err
    assert main(["savings", "--run", str(lenet_run), "--images", "10"]) == 2
    assert "--images: found 10, allowed: from --batch-size (256)" in capsys.readouterr().err


def test_widths_that_the_network_cannot_have_are_refused(tmp_path, capsys):
    widths = tmp_path / "widths.json"
    for width in (0, 999):
        widths.write_text(json.dumps({"conv1": width}))
        assert main(["step", "--model", "lenet", "--widths", str(widths), "--classes", "10"]) == 2
        assert f"lenet, conv1: found width {width}, allowed: 1 to 20" in capsys.readouterr().err


def test_a_projection_needs_a_run_and_its_classes(lenet_run, capsys):
    assert main(["savings", "--run", str(lenet_run)]) == 1
    assert "last.pt" in capsys.readouterr().err
    (lenet_run / "log.jsonl").write_text('{"event": "run", "model": "lenet", "world_size": 1}\n')
    assert main(["savings", "--run", str(lenet_run)]) == 1
    assert "holds no epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["speed"], "speed"),
        (["step", "--round-to", "0"], "--round-to"),
        (["step", "--run", "nowhere"], "nowhere"),
        (["step", "--run", "a", "--reduction", "2"], "--reduction"),
        (["savings"], "--run"),
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


def test_modelled_steps_of_named_devices_stand_beside_each_other(tmp_path, capsys):
    out = tmp_path / "devices.json"
    arguments = ["devices", "--model", "resnet18", "--reduction", "1.5", "--devices", "h100-sxm", "t4", "--arithmetic"]
    assert main([*arguments, "--batch-size", "64", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["device"], row["precision"], row["fused"]) for row in rows] == [
        ("h100-sxm", "bf16", False),
        ("h100-sxm", "bf16", True),
        ("t4", "fp16", False),
        ("t4", "fp16", True),
    ]
    for row in rows:
        ratios, found = row["step_ratio"], row["flops_reduction"]
        assert ratios["time planner"] < ratios["one factor"] < 1 and ratios["time planner"] < ratios["inner"]
        assert found["time planner"] == pytest.approx(1.5, rel=0.03)
    printed = capsys.readouterr().out
    assert "modelled, not measured" in printed and "conv.forward" in printed


def test_the_cost_model_is_held_against_the_clock_and_goes_on_where_it_was_left(tmp_path, capsys, monkeypatch):
    rates = dict.fromkeys(cup.KERNELS, cup.Rate(1e10, 1e9))
    device, measured = cup.Device("made up", "fp32", rates, 0.0, 1, "", overlap=0.0), []
    monkeypatch.setattr(cost, "measured_device", lambda *arguments, passes: measured.append(arguments) or device)
    out = tmp_path / "cost.json"
    arguments = ["cost", "--widths", "2", "--rounds", "1", "--batch-size", "2", "--image-size", "32", "--out", str(out)]
    assert main([*arguments, "--models"]) == 0
    assert known_device(str(out), "fp32") == device and "resnet" not in capsys.readouterr().out
    assert main([*arguments, "--models", "resnet20_cifar", "--resume", str(out)]) == 0
    first = json.loads(out.read_text())
    assert main([*arguments, "--models", "resnet20_cifar", "mobilenet_v2", "--resume", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["rows"][0] == first["rows"][0] and len(measured) == 1
    assert [row["name"] for row in result["rows"]] == ["resnet20_cifar", "mobilenet_v2"]
    for row in result["rows"]:
        assert len(row["timed_s"]) == len(row["modelled_s"]) == 3 and row["flops_reduction"][0] == 1
        assert row["modelled_s"][0] == max(row["modelled_s"])
    assert result["summary"]["median_abs_error"] > 0
    assert main([*arguments, "--precision", "bf16", "--resume", str(out)]) == 1
    assert "asked for" in capsys.readouterr().err


def test_modelled_rates_stand_beside_published_ones(tmp_path, capsys, monkeypatch):
    chosen = [one for one in rates.PUBLISHED_RATES if (one.device, one.network) == ("rtx-3090", "resnet18")]
    monkeypatch.setattr(rates, "PUBLISHED_RATES", chosen)
    assert main(["rates", "--out", str(tmp_path / "rates.json")]) == 0
    row = json.loads((tmp_path / "rates.json").read_text())["rows"][0]
    error = row["modelled"] / 3481.78 - 1
    assert abs(error) < 0.1
    assert f"| 512 | timm | 3,482 | {row['modelled']:,.0f} | {error:+.0%} |" in capsys.readouterr().out


def test_plans_to_a_speed_up_stand_beside_plans_by_flops_at_the_same_reduction(tmp_path, capsys, monkeypatch):
    """Steps are taken, but a clock that nothing else on the machine can slow down says how long they last."""
    honest = targets.turn_timer

    def timer(bench, state, clock):
        taken = honest(bench, state, clock)
        return lambda: taken() and cup.complexity(state.model, bench.example).flops / 1e9

    monkeypatch.setattr(targets, "turn_timer", timer)
    rates = dict.fromkeys(cup.KERNELS, cup.Rate(1e10, 1e9))
    device = cup.Device("measured (cpu)", "fp32", rates, 0.0, 1, "", overlap=0.0)
    calibration, out = tmp_path / "cost.json", tmp_path / "targets.json"
    calibration.write_text(json.dumps({"device": device.to_dict(), "batch_size": 2, "image_size": 32, "clock": "wall"}))
    arguments = ["targets", "--models", "resnet20_cifar", "--criterion", "l2", "--rounds", "2", "--speed-up", "1.5"]
    assert main([*arguments, "--calibration", str(calibration), "--out", str(out)]) == 0
    as_modelled, by_clock, inner, everywhere = json.loads(out.read_text())["rows"]["resnet20_cifar"].values()
    assert as_modelled["modelled"] == pytest.approx(1.5, rel=0.02) and len(as_modelled["speed_ups"]) == 2
    for other in (inner, everywhere):
        assert other["flops_reduction"] == pytest.approx(by_clock["flops_reduction"], rel=0.05)
    assert f"(modelled {by_clock['modelled']:.3f}) after " in by_clock["note"]
    printed = capsys.readouterr().out
    assert "| resnet20_cifar | time, as modelled |" in printed and by_clock["note"] in printed
    assert main([*arguments, "--calibration", str(out)]) == 1
    assert "allowed: a result of bench.py cost" in capsys.readouterr().err


def test_the_rivals_twin_normalises_over_the_channels_that_are_left_of_each_group():
    torch.manual_seed(0)
    full, kept = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), [0, 2, 5, 6]
    nn.init.uniform_(full[1].weight, 0.5, 1.5)
    nn.init.uniform_(full[1].bias)
    pruned = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
    of_channels = {name: value[kept] for name, value in full.state_dict().items() if name[0] in "01"}
    last = {"2.weight": full[2].weight[:, kept], "2.bias": full[2].bias}
    pruned.load_state_dict(of_channels | last)
    twin, images = models.rival.masked_twin(full, pruned), torch.randn(2, 3, 5, 5)
    assert torch.allclose(twin(images), pruned(images), atol=1e-6)
    assert not torch.allclose(full(images), pruned(images), atol=1e-2)


def test_errors_and_ranks_of_modelled_times():
    row = cost.Row("a", timed_s=[4.0, 2.0, 1.0], modelled_s=[6.0, 3.0, 1.0], flops_reduction=[1, 2, 3])
    assert row.errors == [0.5, 0.5, 0.0] and row.rank_correlation == pytest.approx(1)
    assert row.speed_up_errors == pytest.approx([0.0, 0.5])
