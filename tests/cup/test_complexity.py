"""FLOPs, MACs and parameters: the paper's numbers, and networks small enough to count by hand."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cup_twins import Untouched, make_network, plan_of, random_kept
from torch import nn

import cup


@pytest.mark.parametrize(
    ("name", "flops", "macs", "params"),
    [
        ("resnet18", 3_637_229_544, None, 11_689_512),
        ("resnet34", 7_340_368_872, None, 21_797_672),
        ("resnet50", 8_212_012_520, 4_089_184_256, 25_557_032),
    ],
)
def test_dense_networks_cost_what_the_paper_counted(name, flops, macs, params):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    cost = cup.complexity(model, torch.empty(1, 3, 224, 224, device="meta"))
    assert cost.flops == flops
    assert cost.params == params
    assert macs is None or cost.macs == macs


class Calls(nn.Module):
    """One layer called twice, ReLU and pooling as functions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.conv(F.relu(self.conv(x)))), 1).flatten(1))


CONV_MACS = 3 * 3 * 3 * 4 * 8 * 8
HAND_COUNTED = {
    "conv with bias": (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8), 2 * CONV_MACS + 4 * 64, CONV_MACS, 3 * 4 * 9 + 4),
    "conv without bias": (nn.Conv2d(3, 4, 3, padding=1, bias=False), (3, 8, 8), 2 * CONV_MACS, CONV_MACS, 3 * 4 * 9),
    "strided conv": (nn.Conv2d(3, 4, 3, 2, 1, bias=False), (3, 8, 8), CONV_MACS // 2, CONV_MACS // 4, 3 * 4 * 9),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (4, 8, 8), 2 * 9 * 4 * 64, 9 * 4 * 64, 36),
    "transposed conv": (nn.ConvTranspose2d(4, 3, 2, 2), (4, 8, 8), 2 * 4 * 3 * 4 * 64 + 3 * 256, 4 * 3 * 4 * 64, 51),
    "linear": (nn.Linear(7, 5), (7,), 2 * 35 + 5, 35, 40),
    "linear on tokens": (nn.Linear(7, 5, bias=False), (6, 7), 2 * 6 * 35, 6 * 35, 35),
    "batch norm": (nn.BatchNorm2d(4), (4, 8, 8), 2 * 4 * 64, 0, 8),
    "relu": (nn.Sequential(nn.ReLU(), nn.ReLU6()), (4, 8, 8), 2 * 4 * 64, 0, 0),
    "max pool": (nn.MaxPool2d(3, 2, 1), (4, 8, 8), 9 * 4 * 16, 0, 0),
    "a window larger than the map": (nn.AvgPool2d(640, padding=1, ceil_mode=True), (4, 8, 6), 10 * 8 * 4, 0, 0),
    "average pool": (nn.AvgPool2d((2, 4)), (4, 8, 8), 8 * 4 * 4 * 2, 0, 0),
    "adaptive pool counts nothing": (nn.AdaptiveAvgPool2d(1), (4, 8, 8), 0, 0, 0),
    "functions count nothing, calls add up": (
        *(Calls(), (3, 8, 8)),
        *(2 * (2 * 81 * 64 + 3 * 64) + 2 * 6 + 2, 2 * 81 * 64 + 6, 81 + 3 + 6 + 2),
    ),
}


class ViewsItsParameter(nn.Module):
    """Gives a part of a parameter to a module of its own, as CaiT and PiT do with their tokens; max pooling with
    indices returns a tuple.
    """

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 3, 8, 8))
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False))
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x):
        values, indices = self.pool(input=self.block(x + self.block[0](self.token[:, :3]).mean()))
        return values, indices


def test_views_of_parameters_tuples_and_inputs_by_keyword_are_counted():
    cost = cup.complexity(ViewsItsParameter(), torch.empty(2, 3, 8, 8))
    assert cost.macs == 2 * CONV_MACS
    assert cost.flops == 2 * cost.macs + 4 * 4 * 16


class Attention(nn.Module):
    """Products outside of layers: q k^T, its product with v, and a linear layer called as a function."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.project = nn.Parameter(torch.zeros(6, 6))

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.linear(torch.softmax(q @ k.transpose(1, 2), -1) @ v, self.project)


class Across(nn.Module):
    """Attention of one sequence to another, 8 channels in two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query, key):
        return self.attention(query, key, key, need_weights=False)[0]


@pytest.mark.parametrize(("queries", "keys"), [(10, 2), (2, 10), (5, 5)])
def test_attention_between_two_sequences_counts_each_at_its_length(queries, keys):
    cost = cup.complexity(Across(), (torch.empty(1, queries, 8), torch.empty(1, keys, 8)))
    projections, output, products = (queries + 2 * keys) * 8 * 8, queries * 8 * 8, 2 * queries * keys * 8
    assert cost.macs == projections + output + products
    assert next(layer for layer in cost.layers if layer.name == "attention").macs == projections


def test_products_outside_of_layers_count():
    cost = cup.complexity(Attention(), torch.empty(1, 5, 6))
    outside = 5 * 5 * 6 * 2 + 5 * 6 * 6
    assert cost.macs == 5 * 6 * 18 + outside
    assert cost.flops == 2 * cost.macs + 5 * 18
    assert cost.layers[-1].macs == outside


@pytest.mark.parametrize("case", list(HAND_COUNTED))
def test_hand_counted_networks(case):
    model, shape, flops, macs, params = HAND_COUNTED[case]
    cost = cup.complexity(model, torch.empty(1, *shape))
    assert (cost.flops, cost.macs, cost.params) == (flops, macs, params)


def test_layers_stand_in_call_order_and_add_up():
    model, images = make_network("lenet")
    cost = cup.complexity(model, images)
    assert [layer.name for layer in cost.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert sum(layer.flops for layer in cost.layers) == cost.flops
    assert sum(layer.macs for layer in cost.layers) == cost.macs
    assert sum(layer.params for layer in cost.layers) == cost.params


def test_cost_is_for_one_sample_whatever_the_batch():
    model, images = make_network("resnet20_cifar")
    assert cup.complexity(model, images) == cup.complexity(model, images[:1])


def test_counting_neither_runs_nor_changes_the_model():
    model, images = make_network("resnet20_cifar")
    model.train()
    before = Untouched(model)
    cup.complexity(model, images)
    before.check()
    assert not any(module._forward_hooks for module in model.modules())


def test_an_input_that_does_not_fit_is_an_error_of_one_line():
    with pytest.raises(cup.CupError, match=r"LeNet does not take inputs of shape \(1, 40, 40\)") as caught:
        cup.complexity(make_network("lenet")[0], torch.empty(1, 1, 40, 40))
    assert "\n" not in str(caught.value)


class Asks(nn.Module):
    """Text models' question about their mask, and what they do then."""

    def __init__(self, then):
        super().__init__()
        self.conv, self.then = nn.Conv2d(3, 4, 1), then

    def forward(self, x, mask):
        return self.then(self.conv(x), mask)


def _skip(x, mask):
    return x if mask.all() else x * mask


def _check(x, mask):
    if torch.isnan(x).any():
        raise ValueError("x is not a number")
    return x


def _check_mask(x, mask):
    assert 1 in mask
    return _skip(x, mask)


@pytest.mark.parametrize("then", [_skip, _check, _check_mask])
def test_code_that_asks_for_entries_is_counted_where_every_answer_costs_the_same(then):
    example = (torch.ones(2, 3, 8, 8), torch.ones(2, 1, 8, 8))
    assert cup.complexity(Asks(then), example).flops == cup.complexity(nn.Conv2d(3, 4, 1), example[0]).flops


def _leave(x, mask):
    return x if mask.all() else F.linear(x, mask[0, 0])


def _repeat(x, mask):
    while not (x > 1).all():
        x = x + mask
    return x


@pytest.mark.parametrize(("then", "reason"), [(_leave, "depends on the entries"), (_repeat, "more than 1000 times")])
def test_costs_that_depend_on_entries_are_an_error(then, reason):
    with pytest.raises(cup.CupError, match=reason):
        cup.complexity(Asks(then), (torch.ones(2, 3, 8, 8), torch.ones(2, 1, 8, 8)))


def test_a_shared_parameter_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert cup.complexity(model, torch.empty(1, 4)).params == 16


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *(("lenet", "inner"), ("mlp", "inner"), ("resnet20_cifar", "inner"), ("vgg16_cifar", "inner")),
        *(("resnet18", "all"), ("mobile_like", "all"), ("dense_like", "all"), ("squeeze_excite", "all")),
        *(("many_layers", "all"), ("resnext50_32x4d", "inner"), ("efficientnet_b0", "all"), ("convnext_tiny", "all")),
    ],
)
def test_costs_after_a_plan_are_what_the_resized_network_counts(name, scope):
    """The planners' arithmetic against a forward pass of the resized network, over two cuts in a row."""
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    for seed in (0, 1):
        plan = plan_of(groups, random_kept(groups, seed=seed, scope=scope))
        now = cup.complexity(model, images)
        flops, expected = cup.flops_after(model, groups, plan, now), cup.complexity_after(model, groups, plan, now)
        groups = cup.apply_plan(model, plan, groups).groups
        assert cup.complexity(model, images) == expected
        assert expected.flops == flops < now.flops


class Rows(nn.Module):
    """Tokens of all samples as rows, as OPT has them; tokens in front of the samples; a layer on numbers of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.one, self.two, self.out = (nn.Linear(a, b) for a, b in ((4, 6), (6, 8), (8, 9), (9, 5)))
        self.own, self.head = nn.Linear(2, 7), nn.Linear(7, 5)
        self.register_buffer("places", torch.rand(1, 3, 2))

    def forward(self, x):
        rows = F.relu(self.one(self.embed(x).flatten(0, 1)))
        behind = self.two(rows.view(*x.shape[:2], -1).transpose(0, 1))
        return self.out(behind).transpose(0, 1).mean(1) + self.head(self.own(self.places)).mean(1)


@pytest.mark.parametrize("tokens", [3, 4])
def test_costs_after_a_plan_are_right_wherever_the_samples_lie(tokens):
    model, x = Rows(), torch.zeros(3, tokens, 4)
    groups = cup.channel_groups(model, x)
    kept = random_kept(groups, scope="all")
    assert len(kept) == 4
    now, plan = cup.complexity(model, x), plan_of(groups, kept)
    expected = cup.complexity_after(model, groups, plan, now)
    cup.apply_plan(model, plan, groups)
    assert cup.complexity(model, x) == expected


def test_flops_after_a_plan_leave_auxiliary_heads_out():
    """They are traced, for they shrink along, but inference does not run them."""
    model, images = torchvision.models.googlenet(num_classes=5, init_weights=False), torch.empty(1, 3, 64, 64)
    groups = cup.channel_groups(model, images)
    plan = plan_of(groups, random_kept(groups))
    expected = cup.flops_after(model, groups, plan, cup.complexity(model, images))
    cup.apply_plan(model, plan, groups)
    assert cup.complexity(model, images).flops == expected


class AsksTwice(nn.Module):
    """Where some but not all of a mask is set, a convolution runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x):
        mask = x > 0
        if mask.any() and not mask.all():
            x = self.conv(x)
        return self.fc(x.mean((2, 3)))


def test_costs_that_hang_on_two_answers_are_told():
    with pytest.raises(cup.CupError, match="depends on the entries of a tensor"):
        cup.complexity(AsksTwice(), torch.zeros(1, 3, 8, 8))


def test_a_pool_takes_a_sequence_of_one_as_torch_does():
    pools = [nn.MaxPool2d(3, padding=1), nn.MaxPool2d((3,), padding=(1,))]
    one, other = (cup.complexity(pool, torch.zeros(1, 3, 9, 9)).flops for pool in pools)
    assert one == other > 0
