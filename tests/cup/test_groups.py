"""The trace: which groups a network has, which may shrink, and that what it does not understand it freezes."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cup_twins import Untouched, assert_close, check_against_twin, make_network, plan_of, randomise, silenced_copy
from torch import nn
from torch.nn.utils import prune

import cup
from train.network.models import build_model

IMAGES = torch.empty(2, 3, 64, 64)


def by_name(groups):
    return {group.name: group for group in groups}


def modules(places):
    return [place.module for place in places]


# --- known networks ---


@pytest.mark.parametrize(("name", "convs"), [("resnet18", ["conv1"]), ("resnet50", ["conv1", "conv2"])])
def test_inner_groups_of_a_residual_network_are_the_blocks_first_convolutions(name, convs):
    """And ResNet-50's stem, which is read by convolutions only: its first shortcut is a convolution too."""
    model, _ = make_network(name)
    groups = cup.channel_groups(model, IMAGES)
    blocks = [n for n, m in model.named_modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    inner = [group for group in groups if group.inner and not group.frozen]
    stem = ["conv1"] if name == "resnet50" else []
    assert [group.name for group in inner] == stem + [f"{block}.{conv}" for block in blocks for conv in convs]
    for group in inner[len(stem) :]:
        block, _, conv = group.name.rpartition(".")
        number = int(conv.removeprefix("conv"))
        assert modules(group.producers) == [group.name]
        assert modules(group.followers) == [f"{block}.bn{number}"]
        assert modules(group.consumers) == [f"{block}.conv{number + 1}"]
        assert group.width == model.get_submodule(group.name).out_channels
    assert cup.prunable_groups(groups) == inner


@pytest.mark.parametrize(("name", "width"), [("resnet18", 1), ("resnet50", 4)])
def test_residual_groups_hold_the_stages_and_are_for_scope_all_only(name, width):
    model, _ = make_network(name)
    groups = cup.channel_groups(model, IMAGES)
    residual = [group for group in groups if not group.inner]
    assert [group.width for group in residual][-4:] == [64 * width, 128 * width, 256 * width, 512 * width]
    last = "conv2" if width == 1 else "conv3"
    stage = next(group for group in residual if f"layer2.0.{last}" in modules(group.producers))
    assert set(modules(stage.producers)) == {"layer2.0.downsample.0"} | {
        f"layer2.{i}.{last}" for i in range(len(model.layer2))
    }
    assert set(modules(stage.consumers)) == {"layer3.0.downsample.0", "layer3.0.conv1"} | {
        f"layer2.{i}.conv1" for i in range(1, len(model.layer2))
    }
    assert not any(group.frozen for group in residual)
    assert not set(residual) & set(cup.prunable_groups(groups))
    assert set(residual) <= set(cup.prunable_groups(groups, "all"))
    frozen = [group for group in groups if group.frozen]
    assert [(group.name, group.frozen) for group in frozen] == [("fc", "it is an output of the network")]


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("mlp", ["fc1", "fc2"]),
        ("lenet", ["conv1", "conv2", "fc1"]),
        ("vgg16_cifar", [f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)]),
        ("resnet20_cifar", [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)]),
        ("mobile_like", ["stem", "expand", "project"]),
        ("dense_like", ["conv1", "conv2", "conv3"]),
        ("squeeze_excite", ["conv1", "squeeze", "conv2"]),
    ],
)
def test_prunable_groups_stand_in_network_order(name, inner):
    model, images = make_network(name)
    assert [group.name for group in cup.prunable_groups(cup.channel_groups(model, images))] == inner


def test_a_stream_that_widens_by_zero_channels_is_a_group_for_what_each_stage_adds():
    groups = cup.channel_groups(*make_network("resnet20_cifar"))
    residual = {group.name: group for group in groups if not group.inner}
    assert {name: (group.width, group.full_width, group.frozen) for name, group in residual.items()} == {
        "conv1": (16, 16, ""),
        "layer2.0.conv2": (8, 8, ""),
        "layer3.0.conv2": (16, 16, ""),
    }
    last = {name: group.producers[-1] for name, group in residual.items()}  # layer3.2.conv2 writes all of them
    assert last["conv1"].channel_of_index.tolist() == [-1] * 24 + [*range(16)] + [-1] * 24
    assert (
        last["layer2.0.conv2"].channel_of_index.tolist()
        == [-1] * 16 + [*range(8)] + [-1] * 16 + [*range(8)] + [-1] * 16
    )
    assert last["layer3.0.conv2"].channel_of_index.tolist() == [*range(16)] + [-1] * 32 + [*range(16)]


class PaddedByCode(nn.Module):
    """A shortcut as most CIFAR ResNets write it: how many zero channels there are stands in the code."""

    def __init__(self, before=2, after=2):
        super().__init__()
        self.before, self.after = before, after
        self.narrow, self.wide = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4 + before + after, 3, padding=1)
        self.fc = nn.Linear(4 + before + after, 5)

    def forward(self, x):
        x = self.narrow(x).relu()
        return self.fc((self.wide(x) + F.pad(x, (0, 0, 0, 0, self.before, self.after))).relu().mean((2, 3)))


def test_zero_channels_that_the_code_counts_stay_and_those_around_them_may_go():
    model, images = PaddedByCode(), torch.randn(2, 3, 8, 8)
    groups = by_name(check_against_twin(model, images))
    assert (groups["narrow"].width, groups["narrow"].frozen) == (4, "")
    assert groups["wide"].frozen == "a shortcut pads it with zero channels"


class PaddedByModule(PaddedByCode):
    """The same as a module, whose numbers can follow."""

    def __init__(self, before=2, after=2, value=0.0):
        super().__init__(before, after)
        self.pad = nn.ConstantPad3d((0, 0, 0, 0, before, after), value)

    def forward(self, x):
        x = self.narrow(x).relu()
        return self.fc((self.wide(x) + self.pad(x)).relu().mean((2, 3)))


def test_zero_channels_of_a_module_go_on_both_sides():
    model, images = PaddedByModule(), torch.randn(2, 3, 8, 8)
    groups = by_name(check_against_twin(model, images))
    assert (groups["wide"].width, groups["wide"].frozen) == (2, "")
    cup.apply_plan(model, cup.plan_by_counts(model, [*groups.values()], {"wide": 1}, cup.PlanOptions(scope="all")))
    assert model.pad.padding == (0, 0, 0, 0, 1, 1)
    assert cup.channel_groups(model, images)[1].width == 1


class PaddedTwice(PaddedByModule):
    """One module pads two streams, or one stream twice."""

    def __init__(self, again):
        super().__init__()
        self.again, self.wider = again, nn.Conv2d(8, 12, 3, padding=1)
        self.other, self.fc = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(12 if again else 8, 5)

    def forward(self, x):
        x = self.narrow(x).relu()
        y = (self.wide(x) + self.pad(x)).relu()
        y = self.wider(y) + self.pad(y) if self.again else y + self.other(x) * self.pad(x)
        return self.fc(y.relu().mean((2, 3)))


@pytest.mark.parametrize("again", [True, False])
def test_a_module_that_pads_twice_ties_what_it_pads_or_freezes_it(again):
    groups = check_against_twin(PaddedTwice(again), torch.randn(2, 3, 8, 8))
    for group in cup.prunable_groups(groups, "all"):
        model = PaddedTwice(again)
        cup.apply_plan(model, cup.plan_by_counts(model, groups, {group.name: 1}, cup.PlanOptions(scope="all")), groups)
        model(torch.randn(2, 3, 8, 8))
    assert bool(cup.prunable_groups(groups, "all")) != again


class PaddedInARow(PaddedByModule):
    """Two modules pad one after the other."""

    def __init__(self):
        super().__init__()
        self.more, self.fc = nn.ZeroPad3d((0, 0, 0, 0, 1, 1)), nn.Linear(10, 5)
        self.wide = nn.Conv2d(4, 10, 3, padding=1)

    def forward(self, x):
        x = self.narrow(x).relu()
        return self.fc((self.wide(x) + self.more(self.pad(x))).relu().mean((2, 3)))


def test_padding_in_a_row_can_be_cut_again_and_again():
    model, images = PaddedInARow(), torch.randn(2, 3, 8, 8)
    groups = check_against_twin(PaddedInARow(), images)
    for width in (2, 1):
        plan = cup.plan_by_counts(model, groups, {"wide": width}, cup.PlanOptions(scope="all"))
        groups = cup.apply_plan(model, plan, groups).groups
        assert model(images).shape == (2, 5)
        assert [group.width for group in cup.channel_groups(model, images)] == [group.width for group in groups]


@pytest.mark.parametrize(("before", "after", "value"), [(1, 3, 0.0), (2, 2, 0.5)])
def test_channels_behind_padding_of_another_kind_stay(before, after, value):
    groups = cup.channel_groups(PaddedByModule(before, after, value), torch.randn(2, 3, 8, 8))
    assert not cup.prunable_groups(groups, "all")


def test_flatten_gives_each_channel_a_block_of_columns_and_concat_an_offset():
    groups = by_name(cup.channel_groups(*make_network("lenet")))
    (fc1,) = groups["conv2"].consumers
    assert fc1.channel_of_index.tolist() == [channel for channel in range(50) for _ in range(16)]
    dense = by_name(cup.channel_groups(*make_network("dense_like")))
    conv3 = next(place for place in dense["conv2"].consumers if place.module == "conv3")
    assert conv3.channel_of_index.tolist() == [-1] * 6 + [0, 1, 2, 3]
    fc = next(place for place in dense["conv1"].consumers if place.module == "fc")
    assert fc.channel_of_index.tolist() == [-1] * 20 + [c for c in range(6) for _ in range(4)] + [-1] * 16
    gated = by_name(cup.channel_groups(*make_network("squeeze_excite")))["conv1"]
    assert modules(gated.producers) == ["conv1", "excite"]


@pytest.mark.parametrize("name", ["resnet18", "lenet", "mlp", "mobile_like", "dense_like", "squeeze_excite"])
def test_logits_are_frozen_and_the_network_input_belongs_to_no_group(name):
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert by_name(groups)[layers[-1]].frozen == "it is an output of the network"
    readers = {module for group in groups for module in modules(group.consumers)}
    assert layers[0] not in readers
    assert set(layers[1:]) - {"depthwise", "widen"} <= readers


@pytest.mark.parametrize("name", ["resnet18", "vgg16_cifar", "resnet20_cifar", "lenet", "mlp"])
def test_the_input_shape_is_found_without_an_example(name):
    model, images = make_network(name)
    found, given = cup.channel_groups(model), cup.channel_groups(model, images)
    assert [(g.name, g.width, g.frozen) for g in found] == [(g.name, g.width, g.frozen) for g in given]


@pytest.mark.parametrize("act", [cup.channel_groups, cup.describe])
def test_tracing_neither_runs_nor_changes_the_model(act):
    model, images = make_network("resnet20_cifar")
    model.train()
    model.layer1.eval()
    before = Untouched(model)
    act(model, images)
    before.check()


@pytest.mark.parametrize("act", [cup.channel_groups, cup.describe, cup.complexity])
def test_hooks_on_the_model_do_not_fire(act):
    """Somebody's probe on the activations would be handed tensors without values."""
    model, images = make_network("resnet20_cifar")
    calls = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, inputs: calls.append(module))
        module.register_forward_hook(lambda module, inputs, output: calls.append(module))
    act(model, images)
    assert not calls


def test_describe_prints_a_line_for_each_group_and_says_why():
    model, images = make_network("resnet20_cifar")
    groups = cup.channel_groups(model, images)
    lines = cup.describe(model, images).splitlines()
    assert len(lines) == len(groups) + 1
    for line, group in zip(lines[1:], groups, strict=True):
        assert line.split()[:2] == [group.name, str(group.width)]
        assert group.frozen in line
        assert ("no: " in line) == bool(group.frozen)
    assert "layer1.0.conv1  32 x 4 " in cup.describe(torchvision.models.resnext50_32x4d(), IMAGES)
    residual = cup.describe(torchvision.models.resnet18(), IMAGES)
    assert 'with scope "all" (residual)' in residual


# --- what the trace does not understand ---


class Parts(nn.Module):
    """Layers to build small networks from; `net` gives it a forward."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(4, 8, 3, padding=1)
        self.twice = nn.Conv2d(16, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.custom = Custom()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.norm = nn.GroupNorm(2, 8)
        self.norm_all = nn.GroupNorm(1, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.instance_norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.plain_norm = nn.BatchNorm2d(8, affine=False)
        self.prelu = nn.PReLU(8)
        self.prelu_one = nn.PReLU()
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.down = nn.Conv2d(6, 8, 2, stride=2, padding_mode="reflect", padding=1, dilation=1)
        self.own_conv = OwnConv(8, 8, 3, padding=1)
        self.own_norm = OwnNorm(8)
        self.counting_norm = CountingNorm(8)
        self.bare, self.bare_groups = nn.LayerNorm(8, elementwise_affine=False), nn.GroupNorm(4, 8, affine=False)
        self.one = nn.Conv2d(1, 8, 3)
        self.shifted = Shifted(8, 8, 1)
        self.flat8, self.ten = nn.Linear(8, 5), nn.Linear(10, 5)
        self.view_ = nn.Flatten()
        self.up_grouped = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.aliased = nn.Conv2d(8, 8, 1)
        self.alias = self.aliased.weight
        self.embed = nn.Linear(8, 8)
        self.mix = nn.Conv1d(8, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.pool = nn.MaxPool1d(3, 1, 1)
        self.flat1 = nn.Linear(512, 6)
        self.flat2 = nn.Linear(6, 5)
        self.fc = nn.Linear(8, 5)

    def head(self, x):
        return self.fc(x.mean((2, 3)))


class Custom(nn.Module):
    def forward(self, x):
        return x.roll(1, 1)


class OwnConv(nn.Conv2d):
    """A subclass, as timm has them: torch.fx looks inside and sees the function."""

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Shifted(nn.Conv2d):
    """Gives the function another bias than its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.shift = nn.Parameter(torch.rand(sizes[1]))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.shift)


class CountingNorm(nn.BatchNorm2d):
    """Counts its batches itself, as timm's BatchNormAct2d does."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return F.relu(x)


def net(forward):
    torch.manual_seed(0)
    made = type("Net", (Parts,), {"forward": lambda self, x: forward(self, x)})
    return randomise(made()), torch.randn(2, 3, 8, 8)


def use_twice(s, x):
    first = s.b(s.a(x))
    return s.head(s.b(first))


def two_convs(s, x, join):
    return s.head(s.c(join(s.a(x), s.b(wide(x)))))


def wide(x):
    """Eight channels out of the three of the input."""
    return x.repeat(1, 3, 1, 1)[:, :8]


FROZEN = {
    "custom module": (lambda s, x: s.head(s.b(s.custom(s.a(x)))), "a", "roll"),
    "einsum": (lambda s, x: s.head(torch.einsum("nchw,cd->ndhw", s.a(x), s.fc.weight.new_ones(8, 8))), "a", "einsum"),
    "integer channel index": (lambda s, x: s.fc(s.a(x)[:, 3].flatten(1)[:, :8]), "a", "getitem"),
    "channel range": (lambda s, x: s.head(s.narrow(s.a(x)[:, :4])), "a", ""),
    "last channels": (lambda s, x: s.head(s.narrow(s.a(x)[:, -4:])), "a", ""),
    "uneven chunks": (lambda s, x: s.head(s.down(s.a(x).repeat(1, 2, 1, 1).chunk(3, 1)[1])), "a", ""),
    "split": (lambda s, x: s.head(s.narrow(torch.split(s.a(x), 4, dim=1)[0])), "a", ""),
    "unbind": (lambda s, x: s.fc(s.a(x).unbind(1)[0].mean(2)), "a", "takes channels apart"),
    "attention": (lambda s, x: s.fc(s.attention(y := s.embed(x.mean(1)), y.flip(1), y)[0].mean(1)), "embed", "linear"),
    "used twice, once on the image": (lambda s, x: s.head(s.b(F.relu(s.b(wide(x)) + s.a(x)))), "b", "more than once"),
    "input of a grouped convolution": (lambda s, x: s.head(s.grouped(s.custom(s.a(x)))), "grouped", "grouped"),
    "parameter in a fixed view": (lambda s, x: s.head(s.b(s.a(x) * s.scale.view(1, 8, 1, 1))), "a", "mul"),
    "layer norm over pixels": (lambda s, x: s.head(s.b(s.layer_norm(s.a(x)))), "a", "layer_norm"),
    "width of another layer": (lambda s, x: s.fc(s.a(x).mean(3).view(-1, s.b(wide(x)).size(1))), "b", "view"),
    "width as a factor": (lambda s, x: s.head(s.b((y := s.a(x)) * y.shape[1])), "a", "mul"),
    "whole shape": (lambda s, x: s.head(s.b((y := s.a(x)) + torch.ones(y.shape))), "a", "add"),
    "number of elements": (lambda s, x: s.head(s.b((y := s.a(x)) / y.numel())), "a", "numel"),
    "softmax over channels": (lambda s, x: s.head(s.b(F.softmax(s.a(x), 1))), "a", "softmax"),
    "mean over channels": (lambda s, x: s.fc(s.a(x).mean(1).mean(1)), "a", "mean"),
    "channels unflattened": (lambda s, x: s.head(s.b(s.a(x).view(2, 2, 4, 8, 8).flatten(1, 2))), "a", "view"),
    "flatten to a fixed size": (lambda s, x: s.flat2(s.flat1(s.a(x).view(-1, 512))), "a", ""),
    "second output": (lambda s, x: (s.head(s.b(x := s.a(x))), x), "a", "output"),
    "weights read elsewhere": (lambda s, x: s.head(s.b(s.a(x))) + s.b.weight.sum((1, 2, 3))[:5], "b", ""),
}


@pytest.mark.parametrize("case", list(FROZEN))
def test_what_is_not_followed_freezes_the_group_with_the_reason(case):
    forward, name, reason = FROZEN[case]
    model, images = net(forward)
    group = by_name(cup.channel_groups(model, images))[name]
    assert group.frozen
    assert reason in group.frozen


def tied_by_function(s, x):
    hidden = s.embed(s.a(x).mean((2, 3)))
    return s.fc(F.linear(F.relu(hidden), s.embed.weight.t()))


def tokens(s, x):
    """(N, C, H, W) -> (N, HW, C), as a transformer or ConvNeXt wants it."""
    return s.a(x).flatten(2).transpose(1, 2)


FOLLOWED = {
    "grouped convolution": lambda s, x: s.head(s.b(s.grouped(s.a(x)))),
    "group norm": lambda s, x: s.head(s.b(s.norm(s.a(x)))),
    "group norm of one group": lambda s, x: s.head(s.b(s.norm_all(s.a(x)))),
    "layer norm": lambda s, x: s.fc(F.gelu(s.layer_norm(s.embed(tokens(s, x)))).mean(1)),
    "layer norm behind a permute": lambda s, x: s.head(
        s.b(s.layer_norm(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    ),
    "instance norm": lambda s, x: s.head(s.b(s.instance_norm(s.a(x)))),
    "prelu": lambda s, x: s.head(s.b(s.prelu_one(s.prelu(s.a(x))))),
    "transposed convolution": lambda s, x: s.head(s.down(F.relu(s.up(s.a(x))))),
    "layer scale": lambda s, x: s.head(s.b(s.scale * s.a(x))),
    "used twice": use_twice,
    "parameter read twice": lambda s, x: s.head(s.b(s.a(x) * s.scale + s.scale)),
    "parameter over pixels": lambda s, x: s.head(s.b(s.a(x) * s.scale.squeeze())),
    "layer scale in a view": lambda s, x: s.head(s.b(s.a(x).mul(s.scale.reshape(1, -1, 1, 1)))),
    "subclasses of layers": lambda s, x: s.head(s.b(s.own_norm(s.own_conv(s.a(x))))),
    "norm that counts its batches": lambda s, x: s.head(s.b(s.counting_norm(s.a(x)))),
    "tokens": lambda s, x: s.fc(s.embed(tokens(s, x))[:, 0]),
    "squeezed": lambda s, x: s.fc(F.adaptive_avg_pool2d(s.a(x), 1).squeeze(-1).squeeze(-1)),
    "new axes": lambda s, x: s.head(s.b(s.a(x).mean((2, 3))[:, :, None, None])),
    "one pixel": lambda s, x: s.fc(s.a(x)[:, :, 3, 0]),
    "mean that keeps its axes": lambda s, x: s.head(s.b((y := s.a(x)) - y.mean((2, 3), keepdim=True))),
    "divided": lambda s, x: s.head(s.b(s.a(x) / 2)),
    "sums over pixels": lambda s, x: s.fc(s.a(x).sum(3).amax(2)),
    "channels from a size": lambda s, x: s.fc((y := s.a(x)).view(y.shape[0], y.shape[1], -1).mean(2)),
    "flatten by size": lambda s, x: s.flat2(s.flat1((y := s.a(x)).view(y.size(0), -1))),
    "residual add": lambda s, x: two_convs(s, x, torch.add),
    "broadcast gate": lambda s, x: two_convs(s, x, lambda p, q: p * torch.sigmoid(q.mean((2, 3), keepdim=True))),
    "same channels twice": lambda s, x: s.head(s.twice(torch.cat([y := s.a(x), y], 1))),
    "every second pixel": lambda s, x: s.head(s.b(s.a(x)[:, :, ::2, ::2])),
    "number added": lambda s, x: s.head(s.b(2 * s.a(x) + 1)),
    "size of the image": lambda s, x: s.head(s.b(F.interpolate(s.c(y := s.a(x)), size=y.shape[2:]))),
}


def counted(read):
    """A number read from the activations scales them."""
    return lambda s, x: s.head(s.b((y := s.a(x)) * (read(y) / 100)))


def view_of_the_scale_twice(s, x):
    scale = s.scale.view(1, -1, 1, 1)
    return s.head(s.c(s.b(s.a(x) * scale) * scale))


SOUND = {
    **FOLLOWED,
    "layer norm without weights, used twice": lambda s, x: s.fc(s.bare(s.embed(s.bare(tokens(s, x)))).mean(1)),
    "group norm without weights, used twice": lambda s, x: s.head(s.c(s.bare_groups(s.b(s.bare_groups(s.a(x)))))),
    "view of a scale, used twice": view_of_the_scale_twice,
    "view of a scale to a fixed size": lambda s, x: s.head(s.b(s.a(x) * s.scale.view(1, 8, 1, -1))),
    "clamped by another layer": lambda s, x: two_convs(s, x, torch.clamp),
    "clamped by a parameter": lambda s, x: s.head(s.b(s.a(x).clamp(s.scale))),
    "function on a layer's weights": lambda s, x: s.head(F.conv2d(s.a(x), s.b.weight, s.b.bias, 1, 1)),
    "function with other groups": lambda s, x: s.head(F.conv2d(s.a(x), s.one.weight, None, 1, 1, 1, 8)),
    "function with other norm groups": lambda s, x: s.head(F.group_norm(s.a(x), 4, s.norm.weight, s.norm.bias)),
    "weights as the input": lambda s, x: s.a(x).sum() * F.linear(s.fc.weight, s.embed.weight)[:2, :5],
    "another bias than its own": lambda s, x: s.head(s.b(s.shifted(s.a(x)))),
    "torch.numel": counted(torch.numel),
    "numel of a shape": counted(lambda y: y.shape.numel()),
    "stride": counted(lambda y: y.stride(0)),
    "shape turned around": counted(lambda y: y.shape[::-1][2]),
    "width asked for twice": lambda s, x: s.flat8(
        s.a(x).view((y := s.a(x)).shape[0], y.shape[1], y.shape[1], -1)[0, 0]
    ),
    "squeezed of all axes": lambda s, x: s.fc(F.adaptive_avg_pool2d(s.a(x), 1).squeeze()),
    "view to a whole size": lambda s, x: s.head(s.b((y := s.a(x)).flatten(2).view(y.size()))),
    "flatten called view": lambda s, x: s.flat2(s.flat1(s.view_(s.a(x)))),
    "reflected channels": lambda s, x: s.ten(F.pad(tokens(s, x), (1, 1), "reflect").mean(1)),
    "mean with keepdims": lambda s, x: s.fc(tokens(s, x).mean(1, keepdims=True).flatten(1)),
    "other reader in evaluation": lambda s, x: s.head((s.b if s.training else s.c)(s.a(x))),
    "statistics read as a tensor": lambda s, x: s.head(s.b(s.own_norm(s.a(x)))) + s.own_norm.running_mean[:5],
    "grouped transposed convolution": lambda s, x: s.head(s.b(s.up_grouped(s.a(x)))),
    "two names for a layer's weight": lambda s, x: s.head(s.c(s.aliased(s.a(x)))),
    **{case: forward for case, (forward, _, _) in FROZEN.items() if case != "second output"},
    "reshape to a fixed width": lambda s, x: s.fc(s.a(x).mean((2, 3)).reshape(-1, 8)),
    "view to a fixed shape": lambda s, x: s.head(s.b(s.a(x).view(-1, 8, 8, 8))),
    "chunks joined again": lambda s, x: s.head(s.b(torch.cat(s.a(x).chunk(2, 1), 1))),
    "values of a maximum": lambda s, x: s.fc(s.a(x).mean(3).max(2)[0]),
    "add by keyword": lambda s, x: two_convs(s, x, lambda p, q: torch.add(p, other=q)),
    "mul by keywords": lambda s, x: two_convs(s, x, lambda p, q: torch.mul(input=p, other=q)),
    "cat by keywords": lambda s, x: s.head(s.twice(torch.cat(tensors=[s.a(x), s.a(x)], dim=1))),
    "relu by keyword": lambda s, x: s.head(s.b(F.relu(input=s.a(x)))),
    "module by keyword": lambda s, x: s.head(s.b(input=s.a(x))),
    "flatten by keyword": lambda s, x: s.flat2(s.flat1(torch.flatten(input=s.a(x), start_dim=1))),
    "weights tied by a function": tied_by_function,
    "convolution over tokens": lambda s, x: s.fc(s.mix(s.embed(s.a(x).mean(3))).mean(2)),
    "convolution over embedded tokens": lambda s, x: s.fc(s.mix(s.embed(x.repeat(1, 3, 1, 1)[:, :8].mean(3))).mean(2)),
    "pooling across features": lambda s, x: s.fc(F.max_pool1d(s.embed(s.a(x).mean((2, 3))), 3, 1, 1)),
    "pooling module across features": lambda s, x: s.fc(s.pool(s.embed(s.a(x).mean((2, 3))))),
    "width as a number": lambda s, x: s.head(s.b((y := s.a(x)) * y.shape[1])),
    "residual add in place": lambda s, x: two_convs(s, x, lambda p, q: p.add_(q)),
    "added to itself": lambda s, x: s.head(s.b((y := s.a(x)) + y)),
    "norm without weights, used twice": lambda s, x: s.head(s.c(s.plain_norm(s.b(s.plain_norm(s.a(x)))))),
}


@pytest.mark.parametrize("case", list(SOUND))
def test_what_may_shrink_by_the_trace_can_shrink(case):
    """The one rule for every network: after any cut that the groups allow it computes what its masked twin does."""
    model, images = net(SOUND[case])
    groups = cup.channel_groups(model, images)
    free = cup.prunable_groups(groups, "all")
    kept = {group.name: tuple(range(i % 2, group.width, 2 + i % 2)) for i, group in enumerate(free)}
    model, images = model.double().eval(), images.double()
    twin = silenced_copy(model, groups, kept)
    cup.apply_plan(model, plan_of(groups, kept), groups)
    with torch.no_grad():
        assert_close(model(images), twin(images))


@pytest.mark.parametrize("case", list(FOLLOWED))
def test_what_is_understood_may_shrink(case):
    model, images = net(FOLLOWED[case])
    assert not by_name(cup.channel_groups(model, images))["a"].frozen


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_weights_that_are_computed_on_the_fly_freeze_their_layer_and_the_one_before(compute):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), compute(nn.Conv2d(4, 6, 1)), nn.Flatten(), nn.Linear(24, 2))
    groups = by_name(cup.channel_groups(model, torch.empty(1, 3, 2, 2)))
    assert groups["0"].frozen == groups["1"].frozen == "1 is not followed"


def test_a_grouped_convolution_and_a_group_norm_go_by_whole_groups():
    for case in ("grouped convolution", "group norm"):
        model, images = net(FOLLOWED[case])
        group = by_name(cup.channel_groups(model, images))["a"]
        assert group.width == 2
        assert group.producers[0].channel_of_index.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        cup.apply_plan(model, cup.plan_by_counts(model, cup.channel_groups(model, images), {"a": 1}))
        assert (model.a.out_channels, model.b.in_channels) == (4, 4)
        layer = model.grouped if case == "grouped convolution" else model.norm
        assert (layer.groups, layer.in_channels, layer.out_channels) == (1, 4, 4) if layer is model.grouped else True
        assert (layer.num_groups, layer.num_channels) == (1, 4) if layer is model.norm else True


# --- what cannot be traced ---


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        if x.sum() > 0:
            return self.fc(x)
        return self.fc(-x)


def test_a_network_that_torch_fx_cannot_trace_is_an_error_of_one_line(capfd):
    model = Branches()
    before = Untouched(model)
    with pytest.raises(cup.CupError, match="cannot trace Branches") as caught:
        cup.channel_groups(model, torch.empty(2, 4))
    assert "\n" not in str(caught.value)
    before.check()
    assert capfd.readouterr().err == ""


def test_an_input_that_does_not_fit_is_an_error_of_one_line(capfd):
    with pytest.raises(cup.CupError, match=r"\(1, 40, 40\)") as caught:
        cup.channel_groups(build_model("lenet", 10), torch.empty(2, 1, 40, 40))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "no traceback beside the one line"


def test_a_network_whose_input_cannot_be_guessed_asks_for_an_example():
    with pytest.raises(cup.CupError, match="example_input"):
        cup.channel_groups(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 23 * 23, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_in_another_precision_has_the_same_groups(dtype):
    model, images = make_network("lenet")
    wanted = [(g.name, g.width, g.frozen) for g in cup.channel_groups(model, images)]
    model = model.to(dtype)
    assert [(g.name, g.width, g.frozen) for g in cup.channel_groups(model, images.to(dtype))] == wanted
    assert [(g.name, g.width, g.frozen) for g in cup.channel_groups(model)] == wanted
    assert cup.plan_by_reduction(model, cup.channel_groups(model, images.to(dtype)), 1.5).removed
