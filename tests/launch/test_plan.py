"""launch/plan.py: what a training will take adds up, and comes from the cost model and the methods' own ramps."""

import dataclasses
import json
import math

import pytest
import torch
from launching import ROOT
from torch import nn

import cup
from data.batch import train_size
from launch import bench, plan
from launch.benches import savings_modelled
from launch.projections import schedule
from launch.projections.memory import step_memory
from launch.projections.network import ModelledCosts, Moment, Network
from launch.projections.ramps import ramp_to_target
from launch.projections.variants import Projection, to_reduction, to_speedup
from train.config import RunConfig, parse_config
from train.network.models import build_model
from train.preprocessing import settled

RECIPE = ["resnet20_cifar10", "--images", "50000", "--val-images", "10000", "--classes", "10"]


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network.of(build_model("resnet20_cifar", 10), (3, 32, 32))


@pytest.fixture
def cost() -> cup.DeviceCost:
    return cup.device_cost("titan-xp", precision="fp32", batch_size=128)


def config(*settings: str) -> RunConfig:
    found = parse_config(["--config", str(ROOT / "launch/configs/resnet20_cifar10.yaml"), *settings], "plan.py", "")
    return dataclasses.replace(found, data=settled(found.data, None))


# --- hours ---


def test_hours_are_steps_times_seconds_with_evaluation_resizes_and_warm_up():
    training = schedule.Schedule(epochs=4, images=1000, val_images=90, step_images=64, batch_size=16)
    assert (training.steps_per_epoch, training.val_steps_per_epoch) == (960 // 16, 6)
    costs = {20: schedule.Costs(step_s=2.0, val_s=1.0, first_s=2.5), 10: schedule.Costs(1.0, 0.5, 4.0)}
    first, second = schedule.segments([20, 10, 10, 10], costs.get, lambda width: 20 / width, training, resize_s=7)
    assert (first.first, first.last, second.first, second.last) == (1, 1, 2, 4)
    assert first.hours == pytest.approx((60 * 2.0 + 6 * 1.0 + 0.5) / 3600)
    assert second.hours == pytest.approx((180 * 1.0 + 18 * 0.5 + 3.0 + 7) / 3600)
    assert schedule.hours([first, second]) == pytest.approx(first.hours + second.hours)


@pytest.mark.parametrize(("ema_decay", "batches"), [("0", 79), ("0.9", 2 * 79)])
def test_weights_and_their_moving_average_are_both_evaluated(network, cost, ema_decay: str, batches: int):
    averaged = config("--train.epochs", "10", "--train.ema_decay", ema_decay)
    projection = Projection(averaged, network, cost, images=50000, val_images=10000)
    [part] = projection.estimate(projection.dense()).segments
    assert (part.steps, part.val_steps) == (10 * 390, 10 * batches)


def test_an_epoch_is_priced_at_the_size_of_its_images_and_evaluated_at_the_full_one(network, cost):
    groups_16 = cup.channel_groups(network.model, torch.zeros(1, 3, 16, 16))
    forward = cup.device_cost("titan-xp", precision="fp32", batch_size=128, training=False)
    widths = {**network.dense_widths, "layer1.0.conv1": 8}
    found = ModelledCosts(network, cost, 32).at(Moment(widths, 16))
    assert found.step_s == cost.of(network.model, groups_16).at(widths)
    assert found.val_s == forward.of(network.model, network.groups).at(widths)


def test_growing_images_are_those_of_the_loader_and_save_what_small_ones_cost_less(network, cost):
    growing = config("--train.epochs", "10", "--data.start_size", "16", "--data.grow_epochs", "8")
    growing = dataclasses.replace(growing, data=dataclasses.replace(growing.data, size_step=8))
    projection = Projection(growing, network, cost, images=50000, val_images=10000)
    dense = projection.dense()
    fixed, grown = projection.estimate(dense), projection.estimate(projection.growing(dense))
    costs = ModelledCosts(network, cost, 32)
    by_epoch = [costs.at(Moment(network.dense_widths, train_size(growing.data, epoch))) for epoch in range(10)]
    seconds = sum(390 * one.step_s + 79 * one.val_s for one in by_epoch)
    assert 3600 * grown.gpu_hours == pytest.approx(seconds)
    assert [(part.first, part.last) for part in grown.segments] == [(1, 4), (5, 8), (9, 10)]
    assert 3600 * fixed.gpu_hours == pytest.approx(10 * (390 * by_epoch[-1].step_s + 79 * by_epoch[-1].val_s))
    assert (grown.speedup, grown.flops_reduction) == (1, 1), "of the network, at images of full size"
    assert grown.images_per_s == pytest.approx(128 / by_epoch[0].step_s), "the loader is needed most at the smallest"


# --- ramps ---


def test_a_ramp_follows_the_line_to_its_speed_up(network, cost):
    prune = to_speedup(config().prune, 1.5)
    prune = dataclasses.replace(prune, last_epoch=15, round_to=1)
    widths = ramp_to_target(network, prune, 20, cost).widths
    seconds = cost.of(network.model, network.groups)
    assert (len(widths), widths[0]) == (20, network.dense_widths)
    assert widths[14:] == [widths[14]] * 6
    found = [seconds.now / seconds.at(one) for one in widths]
    wanted = [cup.reduction_at(epoch, 1.5, 15) for epoch in range(1, 21)]
    assert found == pytest.approx(wanted, rel=0.05), "between the cuts that are planned, too"


def test_a_ramp_cuts_when_the_method_would_and_only_in_its_scope(network, cost):
    prune = to_reduction(config().prune, 2.0)
    prune = dataclasses.replace(prune, last_epoch=9, every=4, round_to=4)
    widths = ramp_to_target(network, prune, 10, cost).widths
    assert [index + 1 for index in range(1, 10) if widths[index] != widths[index - 1]] == [5, 9]
    assert network.reduction(widths[-1]) == pytest.approx(2.0, rel=0.02)
    inner = {group.name for group in cup.prunable_groups(network.groups, "inner")}
    assert {name for name, width in widths[-1].items() if width < network.dense_widths[name]} <= inner
    assert all(width % 4 == 0 for width in widths[-1].values())


def test_a_ramp_that_drops_blocks_is_priced_without_them(network):
    launches = cup.device_cost("t4", precision="fp32", batch_size=16)
    settings = {"drop_blocks": True, "round_to": 8, "last_epoch": 3, "criterion": "l2"}
    prune = dataclasses.replace(to_speedup(config().prune, 1.5), **settings)
    ramp = ramp_to_target(network, prune, 3, launches)
    assert ramp.dropped[0] == () and set(ramp.dropped[1]) <= set(ramp.dropped[2]) != set()
    seconds = launches.of(network.model, network.groups)
    assert seconds.now / seconds.at(ramp.widths[2], ramp.dropped[2]) == pytest.approx(1.5, rel=0.05)
    model, images = build_model("resnet20_cifar", 10), torch.zeros(1, 3, 32, 32)
    cup.shrink_to(model, ramp.widths[2], images, dropped=ramp.dropped[2])
    found = network.reduction(ramp.widths[2], ramp.dropped[2])
    assert found == network.dense.flops / cup.complexity(model, images).flops
    assert not to_reduction(prune, 2.0).drop_blocks, "FLOPs know no seconds"


def test_the_network_of_a_plan_is_only_read(network, cost):
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    ramp_to_target(network, to_reduction(config().prune, 2.0), 3, cost)
    after = network.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in {*before, *after})


# --- memory ---


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_memory_is_what_autograd_keeps_and_what_goes_with_each_weight(precision: str, size: int):
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(256, 10))
    model = nn.Sequential(*layers)
    found = step_memory(model, (6, 3, 8, 8), config("--train.precision", precision, "--train.ema_decay", "0.9"))
    image, conv, normalised, log_softmax, statistics = 6 * 3 * 64, 6 * 4 * 64, 6 * 4 * 64, 6 * 10, 2 * 4
    labels, weighting = 6 * 8, 1  # the loss keeps the labels, int64, and the sum of their weights
    floats = image + conv + normalised + log_softmax + statistics + weighting
    assert found.activations == floats * size + labels
    assert found.in_flight == 2 * conv * size
    params = sum(parameter.numel() for parameter in model.parameters())
    assert found.weights == params * (4 * 4 + (0 if precision == "fp32" else 2)), "weight, gradient, momentum, average"
    assert found.total == found.activations + found.in_flight + found.weights


def test_a_network_that_shrinks_while_images_grow_needs_most_at_one_of_its_sizes(network, cost):
    growing = config(
        "--train.epochs", "4", "--data.start_size", "16", "--data.grow_epochs", "2", "--prune.last_epoch", "3"
    )
    growing = dataclasses.replace(growing, data=dataclasses.replace(growing.data, size_step=16))
    projection = Projection(growing, network, cost, images=50000, val_images=0)
    variant = projection.to_target("half", to_reduction(growing.prune, 2.0))
    model = build_model("resnet20_cifar", 10)
    cup.shrink_to(model, variant.ramp.widths[2], torch.zeros(1, 3, 32, 32))
    assert projection.estimate(projection.growing(variant)).memory == step_memory(model, (128, 3, 32, 32), growing)
    assert projection.estimate(variant).memory == step_memory(network.model, (128, 3, 32, 32), growing)


# --- the command ---


def test_the_table_adds_up(tmp_path, capsys):
    out = tmp_path / "plan.json"
    argv = [*RECIPE, "--device", "titan-xp", "--gpus", "2", "--price", "3", "--images-per-core", "500"]
    argv += ["--reductions", "1.5", "--speedups", "1.3", "--out", str(out), "--train.epochs", "6", "--prune.last_epoch"]
    assert plan.main([*argv, "4", "--prune.hard_ramp.kind", "reduction", "--prune.target_reduction", "1.8"]) == 0
    printed = capsys.readouterr().out
    assert "Modelled, not measured" in printed and "by epoch 4" in printed and "64 images each" in printed
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in printed.splitlines() if " | " in line]
    labels = ["dense", "recipe: FR 1.8, inner groups", "FR 1.5, inner groups", "speed-up 1.3, all groups"]
    assert [row[0] for row in rows[2:]] == labels
    variants = json.loads(out.read_text())["variants"]
    for row, variant in zip(rows[2:], variants, strict=True):
        parts = variant["segments"]
        hours = sum(part["steps"] * part["step_s"] + part["val_steps"] * part["val_s"] for part in parts) / 3600
        assert variant["gpu_hours"] == pytest.approx(hours)
        images_per_s = 2 * 64 / min(part["step_s"] for part in parts)
        saved = 100 * (1 - hours / variants[0]["gpu_hours"])
        cells = [f"{hours / 2:.2f}", f"{hours:.2f}", f"{3 * hours:.2f}", f"{saved:.1f}%"]
        cells += [f"{variant['memory_bytes']['total'] / 2**30:.1f}", f"{images_per_s:,.0f}"]
        assert row[3:] == [*cells, str(math.ceil(images_per_s / 500))]
    found = [(variant["flops_reduction"], variant["speedup"]) for variant in variants]
    assert (found[0], found[1][0], found[3][1]) == ((1, 1), *(pytest.approx(x, rel=0.03) for x in (1.8, 1.3)))


def test_a_row_with_growing_images_comes_after_each_where_the_recipe_has_them(capsys):
    settings = ["--data.start_size", "16", "--data.grow_epochs", "2", "--train.epochs", "3", "--prune.last_epoch", "2"]
    settings += ["--prune.method", "none"]
    assert (
        plan.main(
            [*RECIPE, "--device", "a100", "--train.precision", "bf16", "--reductions", "--speedups", "1.2", *settings]
        )
        == 0
    )
    labels = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if " | " in line]
    speedup = "speed-up 1.2, all groups"
    assert labels[2:] == ["dense", "dense, growing images", speedup, f"{speedup}, growing images"]


def test_the_row_of_a_method_that_waits_for_the_training_is_left_out_and_says_so(capsys):
    argv = [*RECIPE, "--device", "a100", "--reductions", "--speedups", "--prune.method", "early"]
    assert plan.main([*argv, "--prune.target_reduction", "2"]) == 0
    assert "no row for the recipe's prune.method early" in capsys.readouterr().out


def test_a_plan_says_that_a_teacher_is_not_in_it(capsys):
    argv = [*RECIPE, "--device", "a100", "--reductions", "--speedups", "--prune.method", "none"]
    assert plan.main([*argv, "--train.teacher", "runs/large/best.pt"]) == 0
    assert "not in it: the teacher's forward pass" in capsys.readouterr().out
    assert plan.main(argv) == 0
    assert "teacher" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nothing_like_it"], ["--recipe: found 'nothing_like_it'"]),
        (["--gpus", "3"], ["data.batch_size: found 128", "multiple of --gpus (3)"]),
        (["--images", "100"], ["--images: found 100", "from a step's, data.batch_size (128)"]),
        (["--model.width", "0.5"], ["model.width: found 0.5, allowed: 1.0"]),
        (["--speedups", "0.5"], ["--speedups", "found '0.5', allowed: a number above 1"]),
        (["--weights", "best.pt"], ["--classes: found 10, allowed: none with --weights"]),
        (["--price", "free"], ["--price", "found 'free', allowed: a number above 0"]),
        (["--train.epoch", "3"], ["train.epoch", "did you mean train.epochs"]),
        (["--device", "t4", "--train.precision", "bf16"], ["precision: found bf16, but t4 has: fp16, fp32"]),
        (["--device", "mine"], ["--device: found mine, allowed: h100-sxm", "or a .json file of bench.py cost --out"]),
        (["--device", "mine.json"], ["mine.json: found no device (No such file or directory)"]),
    ],
)
def test_a_wrong_command_is_one_line(argv: list[str], words: list[str], capsys):
    recipe = [] if argv[0] == "nothing_like_it" else RECIPE
    device = [] if "--device" in argv else ["--device", "a100"]
    assert plan.main([*recipe, *argv, *device]) == 2 or argv[0] == "--device"
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error


def test_images_a_core_loads_are_those_that_were_measured():
    measured = json.loads((ROOT / "results/loader.json").read_text())["images_per_s"]
    assert round(measured["DALI, folder, 1 thread(s)"]["median"]) == plan.IMAGES_PER_CORE


# --- the benchmark ---


def test_savings_on_a_named_device_are_modelled_eager_and_compiled(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(savings_modelled, "RECIPE", "resnet20_cifar10")
    out = tmp_path / "savings.json"
    argv = ["savings", "--device", "titan-xp", "--images", "5000", "--val-images", "500", "--epochs", "40"]
    assert bench.main([*argv, "--batch-size", "256", "--reduction", "1.5", "--out", str(out)]) == 0
    variants = json.loads(out.read_text())["variants"]
    assert list(variants) == ["eager", "compiled"]
    for rows in variants.values():
        dense, paper, timed, growing = rows
        assert dense["saving"] == 0 < min(row["saving"] for row in (paper, timed, growing))
        assert paper["flops_reduction"] == pytest.approx(1.5, rel=0.02)
        assert timed["saving"] == pytest.approx(100 * (1 - timed["gpu_hours"] / dense["gpu_hours"]))
    assert "Modelled, not measured" in capsys.readouterr().out


def test_savings_of_a_run_are_timed_and_of_a_named_device_planned(capsys):
    assert bench.main(["savings", "--device", "a100", "--run", "somewhere"]) == 2
    assert "--run: found somewhere, allowed: none with --device a100" in capsys.readouterr().err


def test_the_published_table_of_savings_is_that_of_its_file():
    """docs/performance.md says what results/savings_modelled.json holds; the goals are 40% and 60%."""
    text = (ROOT / "docs/performance.md").read_text()
    for rows in json.loads((ROOT / "results/savings_modelled.json").read_text())["variants"].values():
        for row in rows:
            hours = sum(part["hours"] for part in row["segments"])
            assert row["gpu_hours"] == pytest.approx(hours)
            assert f"{row['speedup']:.2f} | {hours:.2f} | {row['saving']:.1f}% |" in text
