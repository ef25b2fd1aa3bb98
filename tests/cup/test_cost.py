"""The cost model: against sums by hand, its promises about widths, and cuts priced one by one as all at once."""

import dataclasses
import json
import random

import pytest
import torch
from cup_twins import make_network
from torch import nn

import cup

PRODUCTS = ("conv", "pointwise", "grouped", "wide_grouped", "linear", "attention")
DIAL = 1e9
"""Operations a second in the devices of these tests; a byte takes as long as an operation."""


def flat_device(flops_per_s=DIAL, bytes_per_s=DIAL, launch_s=0.0, granularity=1, precision="fp32", of="all"):
    """of: "products" gives all other kernels no time for their operations."""
    rates = {
        kernel: cup.Rate(flops_per_s if of == "all" or kernel.startswith(PRODUCTS) else 1e30, bytes_per_s)
        for kernel in cup.KERNELS
    }
    return cup.Device("flat", precision, rates, launch_s, granularity, "made up")


class ThreeLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 12, 1, bias=False)
        self.fc = nn.Linear(12, 5)

    def forward(self, images):
        x = torch.relu(self.bn(self.conv(images)))
        return self.fc(self.mix(x).mean((2, 3)))


def seconds(model, example, device, **options):
    groups = cup.channel_groups(model, example)
    return cup.device_cost(device, **({"batch_size": 1} | options)).of(model, groups), groups


IMAGE = torch.empty(1, 3, 10, 10)
PIXELS, BATCH = 100, 4
CONV, MIX, FC = 2 * 27 * 8 * PIXELS, 2 * 8 * 12 * PIXELS, 2 * 12 * 5  # FLOPs for an image


def test_operations_of_three_layers_by_hand():
    """Nothing but operations counts here: forward once, the image has no gradient, two of each of the others.

    Batch norm and activation take one for each of their results.
    """
    device = flat_device(bytes_per_s=1e30)
    found, _ = seconds(ThreeLayers(), IMAGE, device, batch_size=BATCH)
    assert found.now == pytest.approx(BATCH * (2 * CONV + 3 * MIX + 3 * FC + 4 * 8 * PIXELS) / DIAL)
    found, _ = seconds(ThreeLayers(), IMAGE, device, batch_size=BATCH, training=False)
    assert found.now == pytest.approx(BATCH * (CONV + MIX + FC + 2 * 8 * PIXELS) / DIAL)


def test_what_is_not_hidden_behind_the_longest_adds_to_it():
    base = flat_device(launch_s=1e-3)
    total = {o: seconds(ThreeLayers(), IMAGE, dataclasses.replace(base, overlap=o))[0].now for o in (0.0, 0.25, 1.0)}
    parts = [flat_device(bytes_per_s=1e30), flat_device(flops_per_s=1e30), flat_device(1e30, 1e30, launch_s=1e-3)]
    assert total[0] == pytest.approx(sum(seconds(ThreeLayers(), IMAGE, part)[0].now for part in parts))
    assert total[0.25] == pytest.approx(0.75 * total[0] + 0.25 * total[1])
    assert total[1] < total[0]


def test_bytes_of_three_layers_by_hand():
    device = flat_device(flops_per_s=1e30)
    image, wide, mixed = 3 * PIXELS, 8 * PIXELS, 12 * PIXELS
    conv, mix, fc = image + wide, wide + mixed, 12 + 5
    weights = {"conv": 27 * 8, "mix": 8 * 12, "fc": 12 * 5}
    forward = conv + 3 * wide + 2 * wide + mix + (mixed + 12) + fc
    backward = conv + 5 * wide + 3 * wide + 2 * mix + (mixed + 12) + 2 * fc
    matrices = 2 * weights["conv"] + 3 * weights["mix"] + 3 * weights["fc"]
    optimizer = 5 * sum(weights.values())
    wanted = 4 * (BATCH * (forward + backward) + matrices + optimizer) / DIAL
    found, _ = seconds(ThreeLayers(), IMAGE, device, batch_size=BATCH)
    assert found.now == pytest.approx(wanted)
    found, _ = seconds(ThreeLayers(), IMAGE, flat_device(1e30, precision="bf16"), batch_size=BATCH)
    assert found.now == pytest.approx(wanted / 2 + 4 * optimizer / DIAL / 2), "the optimizer works in fp32"
    inference, _ = seconds(ThreeLayers(), IMAGE, device, batch_size=BATCH, training=False)
    forward = conv + 2 * wide + 2 * wide + mix + (mixed + 12) + fc
    assert inference.now == pytest.approx(4 * (BATCH * forward + sum(weights.values())) / DIAL)


def test_fused_activations_cost_nothing_and_in_inference_neither_does_batch_norm():
    device = flat_device(flops_per_s=1e30)
    wide = 4 * 8 * PIXELS / DIAL
    for training, passes in ((True, 2 + 3), (False, 2 + 2)):
        eager, _ = seconds(ThreeLayers(), IMAGE, device, training=training)
        fused, _ = seconds(ThreeLayers(), IMAGE, device, training=training, fused=True)
        assert eager.now - fused.now == pytest.approx(passes * wide)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.bn, self.relu, self.head = nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1, bias=False)

    def forward(self, images):
        x = self.first(images)
        return self.head(self.relu(self.bn(self.second(x)) + x))


@pytest.mark.parametrize("fused", [False, True])
def test_a_value_that_two_read_has_its_gradients_added_up_and_a_fused_sum_reads_the_other_alone(fused):
    device = flat_device(flops_per_s=1e30)
    found, _ = seconds(Residual(), IMAGE, device, fused=fused)
    of = {kind: value * DIAL / 4 for kind, value in found.by_kind({}).items()}
    wide = 8 * PIXELS
    assert of["binary.forward"] == pytest.approx(wide * (1 if fused else 3))
    assert of["binary.backward"] == pytest.approx(wide * (3 + fused))
    assert of.get("unary.forward", 0) == pytest.approx(0 if fused else 2 * wide)
    assert of["batch_norm.backward"] == pytest.approx(5 * wide)


def test_every_kernel_takes_at_least_its_launch():
    found, _ = seconds(ThreeLayers(), IMAGE, flat_device(1e30, 1e30, launch_s=1.0), training=False)
    assert found.now == pytest.approx(6), "conv, bn, relu, mix, mean, fc"


@pytest.mark.parametrize(
    "name", ["lenet", "mlp", "resnet20_cifar", "resnet18", "mobile_like", "dense_like", "many_layers"]
)
def test_products_are_those_that_complexity_counts(name):
    """The same multiply-adds as `cup.complexity`, in full and after a cut."""
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    for _ in range(2):
        device = flat_device(bytes_per_s=1e30, of="products")
        found = cup.device_cost(device, batch_size=1, training=False).of(model, groups)
        assert found.now * DIAL == pytest.approx(2 * cup.complexity(model, images).macs, rel=1e-9)
        plan = cup.plan_by_threshold(model, groups, 1.0, cup.PlanOptions(scope="all", round_to=2))
        groups = cup.apply_plan(model, plan, groups).groups


@pytest.mark.parametrize("device", ["h100-sxm", "l4"])
@pytest.mark.parametrize("name", ["resnet18", "mobile_like", "many_layers"])
def test_wider_is_never_faster(name, device):
    model, images = make_network(name)
    found, groups = seconds(model, images, device, batch_size=64)
    for group in cup.prunable_groups(groups, "all"):
        times = [found.at({group.name: width}) for width in range(1, group.width + 1)]
        assert times == sorted(times), group.name


def test_a_width_between_two_that_pay_computes_as_long_as_the_wider_one():
    found, _ = seconds(ThreeLayers(), IMAGE, flat_device(bytes_per_s=1e30, granularity=4))
    assert found.at({"conv": 5}) == found.at({"conv": 8}) > found.at({"conv": 4})


@pytest.mark.parametrize("cost", [cup.device_cost("a100", batch_size=32), cup.FlopsCost()], ids=["seconds", "FLOPs"])
@pytest.mark.parametrize("name", ["resnet20_cifar", "mobile_like", "dense_like", "many_layers"])
def test_steps_priced_one_by_one_add_up_to_the_whole(name, cost):
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    found, prunable = cost.of(model, groups), cup.prunable_groups(groups, "all")
    walk, rng = found.walk({}), random.Random(0)
    widths = {}
    for _ in range(40):
        group = rng.choice(prunable)
        width = rng.randint(1, group.width)
        others = [other for other in prunable if other.name not in walk.neighbours(group.name)]
        changes = {other.name: walk.after(other.name, 1) - walk.cost for other in others}
        priced = walk.after(group.name, width)
        widths[group.name] = width
        walk.move(group.name, width)
        assert walk.cost == pytest.approx(priced, rel=1e-9) == pytest.approx(found.at(widths), rel=1e-9)
        for other, change in changes.items():
            assert walk.after(other, 1) - walk.cost == pytest.approx(change, rel=1e-6, abs=1e-9 * walk.cost)


@pytest.mark.parametrize("name", ["resnet20_cifar", "mobile_like", "dense_like", "many_layers"])
def test_after_a_cut_the_cost_is_what_it_was_said_to_be_and_what_a_new_trace_says(name):
    model, images = make_network(name)
    cost = cup.device_cost("a100", batch_size=32)
    groups = cup.channel_groups(model, images)
    before = cost.of(model, groups)
    plan = cup.plan_by_threshold(model, groups, 1.0, cup.PlanOptions(scope="all"))
    assert plan.removed
    resized = cup.apply_plan(model, plan, groups)
    after = cost.of(model, resized.groups)
    assert after.now == pytest.approx(before.at(plan.new_widths), rel=1e-9)
    assert after.full == pytest.approx(before.now, rel=1e-9)
    assert cost.of(model, cup.channel_groups(model, images)).now == pytest.approx(after.now, rel=1e-9)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 100, 1)

    def forward(self, images):
        x = self.conv(images)
        return (self.head(x), self.second(x)) if self.training else self.head(x)


def test_inference_leaves_out_what_only_training_runs():
    found, _ = seconds(Auxiliary(), IMAGE, flat_device(bytes_per_s=1e30), training=False)
    assert found.now * DIAL == pytest.approx(2 * PIXELS * (3 * 4 + 4 * 2))


def test_attention_counts_its_projections_and_its_products():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.embed(x)
            return self.attention(x, x, x, need_weights=False)[0]

    found, _ = seconds(Attention(), torch.empty(1, 6, 3), flat_device(bytes_per_s=1e30, of="products"), training=False)
    assert found.now * DIAL == pytest.approx(2 * (6 * 3 * 8 + 4 * 6 * 8 * 8 + 2 * 6 * 6 * 8))


def test_groups_of_many_channels_fill_tensor_cores_and_depthwise_gradients_miss_their_bandwidth():
    def kinds(groups: int) -> set[str]:
        layers = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Conv2d(128, 128, 3, groups=groups))
        return {
            one.split(".")[0]
            for one in cup.device_cost("a100", batch_size=1)
            .of(layers, cup.channel_groups(layers, torch.empty(1, 3, 9, 9)))
            .kinds
        }

    assert "grouped" not in kinds(2) and {"grouped", "conv"} <= kinds(4)
    wide = nn.Sequential(nn.Conv2d(3, 128, 1), nn.Conv2d(128, 128, 1, groups=2))
    groups = cup.channel_groups(wide, torch.empty(1, 3, 9, 9))
    assert not any(kind.startswith("conv.") for kind in cup.device_cost("a100", batch_size=1).of(wide, groups).kinds)
    rates = cup.named_device("a100", "bf16").rates
    assert rates["grouped.weight"].bytes_per_s < rates["grouped.forward"].bytes_per_s / 3


def test_a_device_survives_its_plain_data():
    device = cup.DEVICES["h100-sxm"].device("h100-sxm", "bf16")
    assert cup.Device.from_dict(json.loads(json.dumps(device.to_dict()))) == device


@pytest.mark.parametrize("name", list(cup.DEVICES))
def test_named_devices_are_below_their_peaks(name):
    sheet = cup.DEVICES[name]
    for precision in sheet.matrix:
        device = sheet.device(name, precision)
        assert device.rates["conv.forward"].flops_per_s >= device.rates["grouped.forward"].flops_per_s
        assert cup.device_cost(name, precision=precision, batch_size=2).granularity == 8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cup.device_cost("h1000", batch_size=1), "h100-sxm"),
        (lambda: cup.device_cost("titan-xp", precision="bf16", batch_size=1), "titan-xp has: fp32"),
        (lambda: cup.device_cost("a100", precision="int8", batch_size=1), "fp32, bf16, fp16"),
        (lambda: cup.device_cost("a100", batch_size=0), "whole number from 1"),
        (lambda: cup.device_cost(flat_device(), precision="bf16", batch_size=1), "measured in fp32"),
        (lambda: cup.Device("x", "fp32", {}, 0.0, 1, ""), "no rate for conv.forward"),
        (lambda: flat_device(granularity=0), "granularity: found 0"),
        (lambda: flat_device(flops_per_s=0.0), "rates: found"),
        (lambda: cup.device_cost("a100", batch_size=1).of(nn.ReLU(), []), "no channel groups"),
    ],
)
def test_a_mistake_is_one_line(make, words):
    with pytest.raises(cup.CupError, match=words):
        make()
