"""One-shot CUP from the command line: what is cut, what is written, and every wrong input as one line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import events, train, write_image_folder, write_network
from safetensors.torch import save_file
from scipy.cluster.hierarchy import leaves_list
from torch import nn

import cup
from launch import evaluate, latency, prune
from launch.dendrogram import cut_height, leaf_order
from train.checkpoint.file import load_checkpoint, save_checkpoint
from train.checkpoint.network import load_network
from train.network.models import build_model
from train.network.precision import Precision


def error_of(arguments: list[str], capfd: pytest.CaptureFixture, exit_code: int | None = None) -> str:
    """The one line on stderr with which the command ends; nothing is printed beside it."""
    code = prune.main(arguments)
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert code == exit_code if exit_code is not None else code != 0
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert captured.out == ""
    return lines[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a dense run with a moving average of the weights."""
    root = tmp_path_factory.mktemp("dense")
    train(root, prune__method="none", train__epochs=2, train__ema_decay=0.9)
    return root / "tiny/last.pt"


def test_a_run_s_averaged_weights_are_cut_to_the_reduction(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The file holds the moving average's rows of the kept filters, bit for bit, and says what was cut."""
    out = tmp_path / "cut.pt"
    assert prune.main([str(dense), "--reduction", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    stored, cut = load_checkpoint(dense), load_network(out)
    (plan,) = cut.plans
    average, kept = stored["ema"]["module.conv1.weight"], list(plan.kept["conv1"])
    assert 1 < len(kept) < 20
    assert torch.equal(cut.model.conv1.weight, average[kept])
    assert not torch.equal(cut.model.conv1.weight, stored["model"]["conv1.weight"][kept])
    reduction = cut.dense.flops / cup.complexity(cut.model, cut.architecture.example_input()).flops
    assert 2 <= reduction <= 2.02
    assert re.search(rf"^conv1 +20 +{len(kept)} +{20 - len(kept)}$", printed, re.MULTILINE)
    assert f"{cut.dense.flops / 1e6:,.3f} M" in printed and f"1.000 x  {reduction:.3f} x" in printed
    assert f"431,080  {sum(p.numel() for p in cut.model.parameters()):,}" in printed
    assert f"written: {out}" in printed
    assert load_checkpoint(out)["widths"] == plan.new_widths


def test_by_t_every_dendrogram_is_cut_at_that_height(tmp_path: Path):
    network = write_network(tmp_path / "full.pt")
    groups = cup.channel_groups(network.model)
    expected = cup.plan_by_threshold(network.model, groups, 0.45, cup.PlanOptions(round_to=4))
    arguments = ["--t", "0.45", "--round-to", "4", "--out", str(tmp_path / "cut.pt")]
    assert prune.main([str(tmp_path / "full.pt"), *arguments]) == 0
    (plan,) = load_network(tmp_path / "cut.pt").plans
    assert plan.removed and plan.digest() == expected.digest()


def test_another_criterion_is_chosen_by_name(tmp_path: Path):
    network = write_network(tmp_path / "full.pt")
    arguments = ["--criterion", "l1", "--reduction", "2", "--out", str(tmp_path / "cut.pt")]
    assert prune.main([str(tmp_path / "full.pt"), *arguments]) == 0
    (plan,) = load_network(tmp_path / "cut.pt").plans
    groups = cup.channel_groups(network.model)
    by_l1 = cup.plan_by_reduction(network.model, groups, 2.0, cup.PlanOptions(criterion="l1"))
    assert plan.digest() == by_l1.digest() != cup.plan_by_reduction(network.model, groups, 2.0).digest()


@pytest.mark.parametrize("criterion", list(cup.CRITERIA))
def test_every_criterion_cuts_in_one_shot(tmp_path: Path, criterion: str):
    write_network(tmp_path / "full.pt", "resnet20_cifar")
    arguments = ["--criterion", criterion, "--reduction", "2", "--out", str(tmp_path / "cut.pt")]
    assert prune.main([str(tmp_path / "full.pt"), *arguments]) == 0
    cut = load_network(tmp_path / "cut.pt")
    assert 2 <= cut.dense.flops / cup.complexity(cut.model, cut.architecture.example_input()).flops <= 2.02


def test_a_criterion_that_cannot_rank_the_network_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture):
    write_network(tmp_path / "full.pt")
    line = error_of([str(tmp_path / "full.pt"), "--criterion", "bn_scale", "--t", "1"], capfd)
    assert "no batch norm with factors follows conv1" in line


@pytest.mark.parametrize("text", ['{"conv1": 5, "fc1": 100}', "conv1: 5\nfc1: 100\n"], ids=["JSON", "YAML"])
def test_by_counts_the_named_groups_get_those_widths(tmp_path: Path, text: str):
    write_network(tmp_path / "full.pt")
    (tmp_path / "counts").write_text(text)
    arguments = ["--counts", str(tmp_path / "counts"), "--out", str(tmp_path / "cut.pt")]
    assert prune.main([str(tmp_path / "full.pt"), *arguments]) == 0
    model = load_network(tmp_path / "cut.pt").model
    assert [model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features] == [5, 50, 100]


def test_a_cut_network_is_cut_again_and_measured_against_the_full_one(tmp_path: Path, capsys: pytest.CaptureFixture):
    full = write_network(tmp_path / "full.pt")
    assert prune.main([str(tmp_path / "full.pt"), "--t", "0.2"]) == 0
    (once,) = tmp_path.glob("full_fr*.pt")  # beside its source, named after what was reached
    assert prune.main([str(once), "--t", "0.4", "--out", str(tmp_path / "twice.pt")]) == 0
    twice = load_network(tmp_path / "twice.pt")
    assert len(twice.plans) == 2 and twice.gpu_hours == 2.0
    replayed, reductions = write_network(tmp_path / "full.pt").model, []
    for plan in twice.plans:
        cup.apply_plan(replayed, plan)
        reductions.append(full.dense.flops / cup.complexity(replayed, full.architecture.example_input()).flops)
    for key, tensor in replayed.state_dict().items():
        assert torch.equal(twice.model.state_dict()[key], tensor)
    assert once.name == f"full_fr{reductions[0]:.2f}.pt"
    assert f"{reductions[0]:.3f} x  {reductions[1]:.3f} x" in capsys.readouterr().out


def test_the_reduction_asked_of_a_cut_network_is_one_of_the_full_network(tmp_path: Path):
    full = write_network(tmp_path / "full.pt", "resnet20_cifar")
    assert prune.main([str(tmp_path / "full.pt"), "--t", "0.6", "--out", str(tmp_path / "once.pt")]) == 0
    assert prune.main([str(tmp_path / "once.pt"), "--reduction", "2", "--out", str(tmp_path / "twice.pt")]) == 0
    once, twice = (load_network(tmp_path / f"{name}.pt") for name in ("once", "twice"))
    flops = [cup.complexity(n.model, n.architecture.example_input()).flops for n in (once, twice)]
    assert 1.1 < full.dense.flops / flops[0] < 1.9
    assert 2 <= full.dense.flops / flops[1] <= 2.02


def test_evaluate_reads_a_cut_run_with_the_data_that_it_was_trained_on(dense: Path, tmp_path: Path, capsys):
    assert prune.main([str(dense), "--t", "0.2", "--out", str(tmp_path / "cut.pt")]) == 0
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "cut.pt")]) == 0
    cut = load_network(tmp_path / "cut.pt")
    cost = cup.complexity(cut.model, cut.architecture.example_input())
    assert f"32 images  {cost.flops / 1e9:.4f} GFLOPs  {cost.params:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["plain.pth", "wrapped.pth", "weights.safetensors"])
def test_a_network_by_name_with_its_weights_file(tmp_path: Path, form: str, capfd: pytest.CaptureFixture):
    """The classes are counted in the weights; evaluation needs to be told on which images, and works then."""
    torch.manual_seed(0)
    weights = build_model("lenet", 3).state_dict()
    file = tmp_path / form
    if form == "wrapped.pth":
        torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in weights.items()}, "epoch": 90}, file)
    else:
        (save_file if form.endswith("safetensors") else torch.save)(weights, file)
    out = tmp_path / "cut.pt"
    assert prune.main(["lenet", "--weights", str(file), "--t", "0.45", "--out", str(out)]) == 0
    cut = load_network(out)
    assert (cut.architecture.num_classes, cut.config, cut.gpu_hours) == (3, None, None)
    assert torch.equal(cut.model.conv1.weight, weights["conv1.weight"][list(cut.plans[0].kept["conv1"])])
    if form == "plain.pth":
        capfd.readouterr()
        assert evaluate.main([str(out)]) == 2
        assert "--data FOLDER" in capfd.readouterr().err
        write_image_folder(tmp_path / "images")
        assert evaluate.main([str(out), "--data", str(tmp_path / "images"), "--batch-size", "6"]) == 0
        assert "18 images" in capfd.readouterr().out


def test_a_torchvision_network_is_cut_for_its_own_images_and_with_scope_all_in_its_residual_streams(tmp_path: Path):
    torch.save(build_model("resnet18", 23).state_dict(), tmp_path / "weights.pth")
    arguments = ["--weights", str(tmp_path / "weights.pth"), "--t", "0.9", "--scope", "all"]
    assert prune.main(["resnet18", *arguments, "--out", str(tmp_path / "cut.pt")]) == 0
    cut = load_network(tmp_path / "cut.pt")
    assert (cut.architecture.num_classes, cut.architecture.input_shape) == (23, (3, 224, 224))
    assert {"conv1", "layer1.0.conv1"} <= set(cut.plans[0].kept)


def test_a_dendrogram_is_drawn_for_each_group(tmp_path: Path):
    write_network(tmp_path / "full.pt")
    assert prune.main([str(tmp_path / "full.pt"), "--t", "0.45", "--dendrogram", str(tmp_path / "trees/new")]) == 0
    pictures = sorted((tmp_path / "trees/new").iterdir())
    assert [path.name for path in pictures] == ["conv1.png", "conv2.png", "fc1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_leaves_stand_in_scipy_s_order_and_in_chains_of_any_depth():
    model = build_model("lenet", 10)
    for cut in cup.cut_groups(model, cup.channel_groups(model), lambda group, ranking: 3):
        assert leaf_order(cut.ranking.tree).tolist() == leaves_list(cut.ranking.tree).tolist()
    channels = 3000
    chain = [[0, 1, 0, 2], *([channels + i - 1, i + 1, 0, i + 2] for i in range(1, channels - 1))]
    assert sorted(leaf_order(np.array(chain, dtype=float))) == list(range(channels))


def test_the_cut_line_lies_at_t_or_between_the_merges_of_a_rounded_width():
    model = build_model("lenet", 10)
    (group, *_) = cup.channel_groups(model)
    (cut, *_) = cup.cut_groups(model, [group], lambda group, ranking: 12)
    made, missed = cut.ranking.heights[7:9]
    assert made < cut_height(cut, None) < missed
    assert cut_height(cut, made + 1e-9) == made + 1e-9
    assert made < cut_height(cut, missed + 1) < missed


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["full.pt"], 2, ["--t --reduction --counts --latency is required"]),
        (["full.pt", "--t", "1", "--reduction", "2"], 2, ["not allowed with"]),
        (["full.pt", "--t", "0"], 1, ["threshold t: found 0.0", "above 0"]),
        (["full.pt", "--reduction", "1"], 1, ["target reduction: found 1.0", "above 1"]),
        (["full.pt", "--t", "1e-9"], 1, ["removes no channel", "nothing was written"]),
        (["full.pt", "--t", "1", "--round-to", "0"], 2, ["--round-to", "'0'", "a whole number from 1"]),
        (["full.pt", "--t", "1", "--criterion", "l3"], 2, ["--criterion", "'l3'", "cup", "l1"]),
        (["full.pt", "--t", "1", "--criterion", "l1", "--features", "incoming"], 2, ["--features", "--criterion cup"]),
        (["full.pt", "--counts", "counts", "--criterion", "l1", "--dendrogram", "x"], 2, ["l1", "no tree"]),
        (["full.pt", "--t", "1", "--num-classes", "3"], 2, ["go with --weights"]),
        (["full.pt", "--latency", "5"], 2, ["--latency", "'5'", "12ms"]),
        (["full.pt", "--latency", "5ms"], 2, ["go together"]),
        (["full.pt", "--t", "1", "--device", "l4"], 2, ["go together"]),
        (["full.pt", "--t", "1", "--batch", "4"], 2, ["go with --latency"]),
        (["full.pt", "--latency", "9s", "--device", "l4"], 2, ["--latency: found 9e+03 ms", "already"]),
        (["full.pt", "--latency", "1us", "--device", "t4", "--precision", "bf16"], 1, ["t4 has: fp16, fp32"]),
        (["missing.pt", "--t", "1"], 2, ["no checkpoint at missing.pt", "--weights FILE"]),
        (["junk.pt", "--t", "1"], 1, ["junk.pt", "no checkpoint of this program"]),
        (["plain.pth", "--t", "1"], 1, ["plain.pth", "--weights"]),
        (["nan.pt", "--t", "1"], 1, ["conv2", "NaN"]),
        (["full.pt", "--t", "1", "--out", "missing/cut.pt"], 1, ["could not write missing/cut.pt"]),
        (["full.pt", "--t", "1", "--out", "plain.pth"], 2, ["plain.pth is there already", "--force"]),
        (["full.pt", "--t", "1", "--dendrogram", "junk.pt"], 1, ["cannot write the dendrograms to junk.pt"]),
        (["lenet", "--weights", "plain.pth", "--model", "no.such:thing", "--t", "1"], 2, ["--model", "name is SOURCE"]),
        (["lenex", "--weights", "plain.pth", "--t", "1"], 2, ["'lenex'", "timm:NAME"]),
        (["lenet", "--weights", "missing.pth", "--t", "1"], 1, ["no file at missing.pth"]),
        (["lenet", "--weights", "missing.safetensors", "--t", "1"], 1, ["no file at missing.safetensors"]),
        (["lenet", "--weights", "junk.pt", "--t", "1"], 1, ["junk.pt", "nothing in it was run"]),
        (["lenet", "--weights", "full.pt", "--t", "1"], 1, ["full.pt is a checkpoint of this program"]),
        (["mlp", "--weights", "plain.pth", "--t", "1"], 2, ["plain.pth: found no classifier of mlp"]),
        (
            ["mlp", "--weights", "plain.pth", "--num-classes", "10", "--t", "1"],
            1,
            ["missing: fc3.weight", "unexpected: conv1.weight", "fc1"],
        ),
        (["lenet", "--weights", "plain.pth", "--num-classes", "4", "--t", "1"], 1, ["fc2.weight (10, 500)"]),
        (["lenet", "--weights", "plain.pth", "--image-size", "64", "--t", "1"], 1, ["(1, 64, 64)"]),
    ],
)
def test_a_wrong_command_is_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, arguments: list[str], exit_code: int, words: list[str]
):
    monkeypatch.chdir(tmp_path)
    network = write_network(Path("full.pt"))
    torch.save(network.model.state_dict(), "plain.pth")
    Path("junk.pt").write_text("not a checkpoint")
    Path("counts").write_text('{"conv1": 5}')
    content = load_checkpoint(Path("full.pt"))
    content["model"]["conv2.weight"][0, 0, 0, 0] = float("nan")
    save_checkpoint(Path("nan.pt"), content)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    line = error_of(arguments, capfd, exit_code)
    assert all(word in line for word in words), line
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"conv9": 5}', ["'conv9'", "conv1, conv2, fc1"]),
        ('{"conv1": 21}', ["'conv1'", "21", "1 to 20"]),
        ('{"conv1": 2.5}', ["counts", "2.5", "a whole number"]),
        ('{"conv1": true}', ["True", "a whole number"]),
        ("[1, 2]", ["counts", "group names"]),
        ('{"conv1": ', ["cannot read the counts"]),
        (None, ["cannot read the counts", "No such file"]),
    ],
)
def test_wrong_counts_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture, text: str | None, words: list[str]):
    write_network(tmp_path / "full.pt")
    if text is not None:
        (tmp_path / "counts").write_text(text)
    line = error_of([str(tmp_path / "full.pt"), "--counts", str(tmp_path / "counts")], capfd)
    assert all(word in line for word in words), line


def test_a_reduction_that_is_reached_already_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture):
    write_network(tmp_path / "full.pt")
    assert prune.main([str(tmp_path / "full.pt"), "--t", "0.45", "--out", str(tmp_path / "cut.pt")]) == 0
    capfd.readouterr()
    assert "already" in error_of([str(tmp_path / "cut.pt"), "--reduction", "1.05"], capfd, exit_code=2)


def test_force_overwrites(tmp_path: Path):
    write_network(tmp_path / "full.pt")
    for t in ("0.4", "0.45"):
        assert prune.main([str(tmp_path / "full.pt"), "--t", t, "--out", str(tmp_path / "cut.pt"), "--force"]) == 0
    assert load_network(tmp_path / "cut.pt").plans[0].threshold == 0.45


def test_the_hours_of_a_run_are_in_what_is_cut_from_it(dense: Path, tmp_path: Path):
    assert prune.main([str(dense), "--t", "0.2", "--out", str(tmp_path / "cut.pt")]) == 0
    log = [json.loads(line) for line in (dense.parent / "log.jsonl").read_text().splitlines()]
    last = events(log, "epoch")[-1]["gpu_hours"]
    assert last <= load_network(tmp_path / "cut.pt").gpu_hours <= log[-1]["gpu_hours"]


def test_a_grouped_convolution_that_is_down_to_one_group_does_not_stop_the_next_cut(tmp_path: Path):
    """Its filters stay bound together in the stored plans, while a new trace would take them one by one."""
    write_network(tmp_path / "0.pt", "regnet_y_400mf", num_classes=4)
    blocks = ("trunk_output.block1.block1-0.f.a.0", "trunk_output.block2.block2-0.f.a.0")
    for number, counts in enumerate(({blocks[0]: 1}, {blocks[1]: 2})):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(counts))
        source, out = tmp_path / f"{number}.pt", tmp_path / f"{number + 1}.pt"
        assert prune.main([str(source), "--counts", str(file), "--out", str(out)]) == 0
    assert load_network(tmp_path / "2.pt").model.trunk_output[0][0].f.b[0].groups == 1


@pytest.mark.parametrize("by_file", [False, True])
def test_a_latency_on_a_known_device_is_modelled(tmp_path: Path, capsys: pytest.CaptureFixture, by_file: bool):
    full, cut = tmp_path / "full.pt", tmp_path / "cut.pt"
    write_network(full, "resnet18")
    cost = cup.device_cost("l4", precision="fp32", batch_size=32, training=False)
    network = load_network(full)
    groups = cup.channel_groups(network.model, network.architecture.example_input())
    target = 1e3 * cost.of(network.model, groups).now / 1.4
    file = tmp_path / "l4.json"
    file.write_text(json.dumps({"device": cost.device.to_dict()}))
    known = str(file) if by_file else "l4"
    arguments = [str(full), "--latency", f"{target}ms", "--device", known, "--batch", "32", "--criterion", "l2"]
    assert prune.main([*arguments, "--out", str(cut)]) == 0
    network = load_network(cut)
    now = 1e3 * cost.of(network.model, network.groups).now
    assert target / 1.01 <= now <= target
    assert f"{now:.3g} ms as modelled, {target:.3g} ms asked for" in capsys.readouterr().out


@pytest.mark.parametrize(("least_ms", "word"), [(0, ""), (25, ", missed by 25.")])
def test_a_latency_here_is_met_as_timed(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch, least_ms, word):
    """The clock says what the model does not know: batch norms take ten times as long, or no cut is below 25 ms."""
    rates = dict.fromkeys(cup.KERNELS, cup.Rate(1e9, 1e9))
    device = cup.Device("made up", "fp32", rates, 0.0, 1, "", overlap=0.0)
    slow = {kernel: cup.Rate(1e8, 1e8) if kernel.startswith("batch_norm") else rate for kernel, rate in rates.items()}
    clock = cup.device_cost(replace(device, rates=slow), batch_size=1, training=False)
    full, cut = tmp_path / "full.pt", tmp_path / "cut.pt"
    write_network(full, "resnet20_cifar")
    network = load_network(full)
    example = network.architecture.example_input()

    def by_the_clock(model):
        return clock.of(model, cup.channel_groups(model, example)).now

    before_s = by_the_clock(network.model)

    def timed_in_turns(models, *arguments):
        return [max(0.030 * by_the_clock(model) / before_s, least_ms / 1e3) for model in models]

    monkeypatch.setattr(latency, "measured_device", lambda *arguments: device)
    monkeypatch.setattr(latency, "_timed_in_turns", timed_in_turns)
    arguments = [str(full), "--latency", "20ms", "--device", "cpu", "--criterion", "l2", "--out", str(cut)]
    assert prune.main(arguments) == 0
    (now_s,) = timed_in_turns([load_network(cut).model])
    assert 0.020 / 1.03 <= now_s <= 0.020 or word
    printed = capsys.readouterr().out
    assert printed.startswith("timing layers on this device, about half a minute\ntiming cuts on this device")
    assert f"timed 30 ms before, {1e3 * now_s:.3g} ms now, 20 ms asked for{word}" in printed
    assert ("note: timed" in printed) and ("the nearest to 1.5 that was found" in printed) == bool(word)


def test_passes_are_timed_in_turns_and_the_models_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latency, "TURNS", 2)
    monkeypatch.setattr(latency, "TURN_SECONDS", 0.0)
    calls = []

    class Named(nn.Identity):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, images):
            assert not self.training
            calls.append((self.name, tuple(images.shape)))
            return images

    models = [Named("before"), Named("cut")]
    device = torch.device("cpu")
    times = latency._timed_in_turns(models, (3, 4, 4), Precision("fp32", device), device, 2)
    assert len(times) == 2 and all(model.training for model in models)
    assert [name for name, _ in calls] == ["before", "before", "cut", "cut"] * 2, (
        "each turn begins with a pass that is not timed"
    )
    assert {shape for _, shape in calls} == {(2, 3, 4, 4)}


def test_a_network_that_kernel_launches_bound_is_not_to_be_cut_deeper(tmp_path: Path, capfd: pytest.CaptureFixture):
    write_network(tmp_path / "full.pt", "resnet20_cifar")
    line = error_of([str(tmp_path / "full.pt"), "--latency", "1us", "--device", "l4"], capfd, exit_code=1)
    assert "no narrower width is faster on l4 (kernel launches bound it" in line and "deeper" not in line


def test_a_network_that_is_fast_enough_here_is_refused_before_layers_are_timed(tmp_path: Path, capfd, monkeypatch):
    monkeypatch.setattr(latency, "measured_device", lambda *arguments: pytest.fail("layers were timed"))
    monkeypatch.setattr(latency, "_timed_in_turns", lambda *arguments: [0.020])
    write_network(tmp_path / "full.pt")
    line = error_of([str(tmp_path / "full.pt"), "--latency", "30ms", "--device", "cpu"], capfd, exit_code=2)
    assert "found 30 ms, but it takes 20 ms already" in line


def test_a_reduction_out_of_reach_is_not_answered_by_asking_for_more(tmp_path: Path, capfd: pytest.CaptureFixture):
    write_network(tmp_path / "full.pt")
    arguments = ["--reduction", "2", "--min-channels", "500"]
    line = error_of([str(tmp_path / "full.pt"), *arguments], capfd, exit_code=1)
    assert "out of reach" in line and "deeper one" not in line
