"""Other people's networks: code that no network of ours has, each kind at its smallest. Twins in float64."""

import copy
import operator
import random
import tracemalloc
from dataclasses import dataclass
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from cup_twins import check_against_twin, randomise
from torch import nn

import cup


def conv(read, written, side=3):
    return nn.Conv2d(read, written, side, padding=side // 2)


class Chain(nn.Module):
    """Three convolutions and a linear layer; `middle` is what happens between the first and the second."""

    def __init__(self, middle=None):
        super().__init__()
        self.c1, self.c2, self.c3, self.fc = conv(3, 16), conv(16, 12), conv(12, 10), nn.Linear(10, 5)
        self.middle = middle

    def forward(self, x):
        y = self.c1(x)
        y = y if self.middle is None else self.middle(self, y)
        return self.fc(self.c3(F.relu(self.c2(y))).mean((2, 3)))


def built(model, *shape):
    torch.manual_seed(0)
    return randomise(model), torch.randn(4, *(shape or (3, 8, 8)))


def frozen(groups):
    return {group.name: group.frozen for group in groups if group.frozen}


# --- arguments that the example does not give ---


class Masked(Chain):
    def forward(self, x, mask=None, *, gain=1.0, **more):
        y = self.c1(x)
        if mask is None:
            y = y.softmax(1)
        return self.fc(self.c3(self.c2(gain * y)).mean((2, 3)))


def test_arguments_that_the_example_leaves_out_have_their_defaults():
    groups = check_against_twin(*built(Masked()))
    assert "softmax" in frozen(groups)["c1"]
    assert set(frozen(groups)) == {"c1", "fc"}


# --- widths that get in as attributes ---


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * self.in_channels**-0.5


class Scaled(Chain):
    def __init__(self):
        super().__init__()
        self.c2 = ScaledConv(16, 12, 3, padding=1)


def branch_on_width(s, y):
    return y.flip(1) if s.c1.out_channels > 15 else y


def table_of_width(s, y):
    return y * torch.linspace(0, 1, s.c1.out_channels)[:, None, None].mean()


def alike(s, y):
    return y if s.c1.out_channels == s.c2.in_channels else 2 * y


ATTRIBUTES = {
    "divided by a width": lambda s, y: y / s.c1.out_channels**0.5,
    "a width in a constant": lambda s, y: y * torch.tensor(s.c1.out_channels / 100),
    "a branch on a width": branch_on_width,
    "a table as long as the width": table_of_width,
    "the shape of a weight": lambda s, y: y / s.c1.weight.shape[0],
    "as many steps as channels": lambda s, y: sum(y / 8 for _ in range(s.c1.out_channels)),
}


@pytest.mark.parametrize("case", list(ATTRIBUTES))
def test_a_width_that_is_read_from_an_attribute_freezes_its_group(case):
    groups = check_against_twin(*built(Chain(ATTRIBUTES[case])))
    assert set(frozen(groups)) - {"c2"} == {"c1", "fc"}


def test_a_convolution_that_scales_by_its_width_keeps_what_it_reads():
    groups = check_against_twin(*built(Scaled()))
    assert frozen(groups)["c1"] == "mul is given a number that depends on its width"
    assert set(frozen(groups)) == {"c1", "fc"}


def test_a_comparison_of_widths_that_shrink_together_freezes_nothing():
    assert set(frozen(check_against_twin(*built(Chain(alike))))) == {"fc"}


def test_code_that_throws_dice_is_traced_alike_each_time_and_moves_nobodys_dice():
    def dice(s, y):
        return y * 2 if random.random() + np.random.rand() + float(torch.rand(())) > 1.5 else y

    model = Chain(dice)
    for _ in range(8):
        random.random()
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        assert set(frozen(cup.channel_groups(model, torch.empty(1, 3, 8, 8)))) == {"fc"}
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda s, y: y.flatten(2).view(len(y), 16, 8, 8), "view to a fixed size 16"),
        (lambda s, y: y.flatten(2).view(len(y), y.shape[1] * 1, 8, 8), "view to a size that is computed"),
        (lambda s, y: y * torch.max(y), "max is not followed"),
    ],
)
def test_the_reason_is_true(middle, reason):
    assert frozen(check_against_twin(*built(Chain(middle))))["c1"] == reason


# --- code that asks for sizes ---


def asks(question):
    return lambda s, y: 2 * y if question(y) else y


SIZES = {
    "a branch on the image's size": asks(lambda y: y.shape[-1] % 2),
    "an assertion on the rank": asks(lambda y: y.dim() == 4 and y.ndim == 4 and len(y.shape) == 4),
    "a type": asks(lambda y: isinstance(y, torch.Tensor) and y.dtype == torch.float32),
    "a whole number of a size": lambda s, y: F.interpolate(y, size=int(y.shape[-1] * 1.5)),
    "zeros for a batch": lambda s, y: y + torch.zeros(y.shape[0], 1, 1, 1).mean(),
    "a loop over pixels": lambda s, y: sum(y[:, :, i : i + 1] for i in range(y.shape[2])),
    "zeros on its device": lambda s, y: y * torch.ones(3, device=y.device, dtype=y.dtype).mean(),
    "sizes in a list": lambda s, y: y.flatten(2).view(*y.shape[:2], *[int(side) for side in y.shape[2:]]),
}


@pytest.mark.parametrize("case", list(SIZES))
def test_sizes_that_steer_the_code_freeze_nothing(case):
    assert set(frozen(check_against_twin(*built(Chain(SIZES[case]))))) == {"fc"}


@pytest.mark.parametrize(
    "middle",
    [
        asks(lambda y: y.shape[1] > 15),
        lambda s, y: y / int(y.shape[1]),
        lambda s, y: sum(y / 8 for _ in range(y.shape[1])),
        lambda s, y: y * torch.ones(y.shape[1]).sum(),
        lambda s, y: y / len(y[0]),
    ],
)
def test_a_channel_count_that_steers_the_code_freezes_its_group(middle):
    groups = check_against_twin(*built(Chain(middle)))
    assert "number" in frozen(groups)["c1"] or "not followed" in frozen(groups)["c1"]
    assert set(frozen(groups)) == {"c1", "fc"}


def test_a_branch_on_what_a_tensor_holds_cannot_be_traced():
    with pytest.raises(cup.CupError, match="entries of a tensor"):
        cup.channel_groups(Chain(asks(lambda y: y.sum() > 0)), torch.empty(1, 3, 8, 8))


# --- idioms ---


class Idioms(nn.Module):
    """Layers to say things with; the first convolution's group must stay free to shrink."""

    def __init__(self, say):
        super().__init__()
        self.c1, self.c2, self.c3, self.fc = conv(3, 8), conv(8, 8), conv(8, 10), nn.Linear(10, 5)
        self.map, self.gate, self.wide, self.joined = conv(8, 1), conv(8, 8, 1), conv(19, 8), conv(11, 8)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.norm, self.frozen_norm = nn.BatchNorm2d(8), torchvision.ops.FrozenBatchNorm2d(8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.tied = conv(8, 8)
        self.equal = EqualConv(8, 8, 3, padding=1)
        self.register_buffer("rows", torch.linspace(0, 1, 8).view(1, 1, 8, 1))
        self.register_buffer("step", torch.tensor(0.5))
        self.say = say
        with torch.no_grad():
            for buffer in self.frozen_norm.buffers():
                buffer.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.fc(self.c3(self.say(self, self.c1(x), x)).mean((2, 3)))


class EqualConv(nn.Conv2d):
    """An equalised learning rate: a constant times the weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = (2 / (self.in_channels * 9)) ** 0.5

    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.padding)


def squeeze_excite(s, y, x):
    batch, channels, _, _ = y.size()
    gate = s.up(F.relu(s.down(y.mean((2, 3)).view(batch, channels)))).sigmoid()
    return y * gate.view(batch, channels, 1, 1)


IDIOMS = {
    "a classic squeeze-excite": squeeze_excite,
    "its gate expanded": lambda s, y, x: y * s.gate(y.mean((2, 3), keepdim=True)).sigmoid().expand_as(y),
    "a gate expanded to sizes": lambda s, y, x: y * s.gate(y[:, :, :1, :1]).expand(-1, -1, *y.shape[2:]),
    "a map over the pixels": lambda s, y, x: y * s.map(y).sigmoid(),
    "joined with the image": lambda s, y, x: s.joined(torch.cat([x, y], 1)),
    "joined with a buffer": lambda s, y, x: s.wide(
        torch.cat([y, s.rows.expand(len(y), -1, -1, 8), s.c2(y), s.rows.expand(len(y), 1, 8, 8), x[:, 1:2]], 1)
    ),
    "powers and sines": lambda s, y, x: torch.sin(y).pow(2) + y**2 + torch.square(y),
    "where": lambda s, y, x: torch.where(y > 0, y, s.c2(y)),
    "numbers where a tensor may be": lambda s, y, x: torch.where(y > 0, torch.pow(y, 3.0), 0.0) + torch.sub(1.0, y),
    "maximum": lambda s, y, x: torch.maximum(y, s.c2(y)),
    "addcmul": lambda s, y, x: torch.addcmul(y, s.c2(y), s.gate(y), value=0.5),
    "stacked": lambda s, y, x: torch.stack([y, s.c2(y)], 1).mean(1),
    "every second pixel": lambda s, y, x: y[..., ::2, 1::2],
    "softmax over pixels": lambda s, y, x: y.softmax(-1),
    "a parameter with new axes": lambda s, y, x: y * s.scale[None, :, None, None],
    "a parameter in two places": lambda s, y, x: s.c2(y * s.scale.view(-1, 1, 1)) + s.scale.exp().view(1, -1, 1, 1),
    "a profile over rows": lambda s, y, x: s.c2(y * s.rows) + s.rows,
    "a norm of buffers": lambda s, y, x: s.frozen_norm(y),
    "a convolution used twice": lambda s, y, x: s.c2(F.relu(s.c2(y))),
    "a norm used twice": lambda s, y, x: s.norm(s.c2(s.norm(y))),
    "an equalised learning rate": lambda s, y, x: s.equal(y),
    "an equalised convolution used twice": lambda s, y, x: s.equal(F.relu(s.equal(y))),
    "a scalar buffer": lambda s, y, x: y * s.step,
    "the shape of another tensor": lambda s, y, x: s.norm(y).flatten(2).reshape_as(s.c2(y)),
    "sizes joined with more": lambda s, y, x: (
        y.flatten(2).view(operator.add(y.shape[:2], (4, 2, 8))).view(operator.add((-1,), y.shape[1:]))
    ),
    "a module that is made on the way": lambda s, y, x: nn.ReLU()(s.c2(y)),
}


@torch.fx.wrap
def rolled(y, shifts):
    shifts[1] = shifts[0]
    return F.relu(y) + shifts[1]


def test_a_function_as_a_whole_may_change_the_list_that_it_is_given():
    groups = check_against_twin(*built(Idioms(lambda s, y, x: rolled(y, [1, 0]))))
    assert next(group for group in groups if group.name == "c1").frozen == "rolled is not followed"


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    def backward(context, gradient):
        return gradient * 2


def test_an_autograd_function_is_not_followed_and_breaks_nothing():
    model, images = built(Idioms(lambda s, y, x: Doubled.apply(y)))
    groups = check_against_twin(model, images)
    assert next(group for group in groups if group.name == "c1").frozen == "apply is not followed"


def _into_itself(model, y):
    y = y * 1.0
    y[:, :, 0] = 2 * y[:, :, 1]
    return y


def _into_zeros(model, y):
    shifted = torch.zeros_like(y)
    shifted[:, 1:] = y[:, :-1]
    return shifted


@pytest.mark.parametrize("middle", [_into_itself, _into_zeros])
def test_what_is_written_into_or_from_stays(middle):
    groups = check_against_twin(*built(Chain(middle)))
    assert set(frozen(groups)) == {"c1", "fc"}


class Looked(Chain):
    """A table of positions, as attention over windows has: its index is longer than any layer is wide."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.rand(20, 1))
        self.register_buffer("index", torch.randint(20, (4096,)))

    def forward(self, x):
        return super().forward(x * self.table[self.index.view(-1)].mean())


def test_a_long_index_costs_no_memory_by_its_square():
    model, images = built(Looked())
    tracemalloc.start()
    cup.channel_groups(model, images)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6  # 4,096 arrays of 4,096 channels' numbers are 67 MB


class Cache:
    def __init__(self, *values):
        self.values, self.names, self.owner = values, {"first": 1}, self


def test_what_an_object_in_the_output_keeps_is_an_output():
    class Kept(Idioms):
        def forward(self, x):
            y = self.c1(x)
            return self.fc(self.c3(F.relu(y)).mean((2, 3))), Cache(y, [x])

    model, images = built(Kept(None))
    groups = cup.channel_groups(model, images)
    assert [group.frozen for group in groups] == [
        "it is an output of the network",
        "",
        "it is an output of the network",
    ]


@pytest.mark.parametrize("case", list(IDIOMS))
def test_idioms_are_followed(case):
    model, images = built(Idioms(IDIOMS[case]))
    groups = check_against_twin(model, images)
    free = {place.module for group in groups if not group.frozen for place in group.producers}
    assert "c1" in free


def test_tied_weights_stay_tied():
    model, images = built(Idioms(lambda s, y, x: s.tied(F.relu(s.c2(y)))))
    model.tied.weight = model.c2.weight
    assert set(frozen(check_against_twin(copy.deepcopy(model), images))) == {"fc"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images).sum().backward()
    optimizer.step()
    groups = cup.channel_groups(model, images)
    before = cup.complexity(model, images)
    plan = cup.PrunePlan({"c1": (0, 2, 5)}, {"c1": 8})
    expected = cup.complexity_after(model, groups, plan, before)
    resized = cup.apply_plan(model, plan, groups)
    cup.carry_optimizer(optimizer, resized)
    assert model.tied.weight is model.c2.weight
    assert model.tied.weight.shape[:2] == (3, 3)
    assert cup.complexity(model, images) == expected
    optimizer.zero_grad()
    model(images).sum().backward()
    optimizer.step()
    assert optimizer.state[model.c2.weight]["momentum_buffer"].shape == model.c2.weight.shape


def test_a_second_use_that_is_not_followed_freezes_the_layer():
    model, images = built(Idioms(lambda s, y, x: s.c2(F.relu(s.gate(y))) + s.joined(torch.cat([s.c2(input=y), x], 1))))
    assert frozen(check_against_twin(model, images))["c2"] == "c2 is called with keywords"


def test_layers_that_share_only_a_bias_stay():
    model, images = built(Idioms(lambda s, y, x: s.norm(s.tied(F.relu(s.c2(y))))))
    model.tied.bias = model.c2.bias
    groups = check_against_twin(model, images)
    assert frozen(groups)["c2"] == "c2 shares a parameter"
    assert frozen(groups)["tied"] == "tied shares a parameter"


class GroupsOfItsOwn(nn.GroupNorm):
    """Gives the function other groups than its own."""

    def forward(self, x):
        return F.group_norm(x, 4, self.weight, self.bias)


def test_a_layer_that_gives_its_function_other_groups_than_its_own_is_not_followed():
    model, images = built(Chain(lambda s, y: s.norm(y)))
    model.norm = GroupsOfItsOwn(2, 16)
    assert "c1" in frozen(check_against_twin(model, images))


# --- hooks ---


def test_forward_hooks_freeze_what_goes_into_their_module_and_comes_out():
    model, images = built(Chain())
    model.c2.register_forward_hook(lambda module, inputs, output: output.roll(1, 1))
    groups = check_against_twin(model, images)
    assert frozen(groups)["c1"] == frozen(groups)["c2"] == "c2 has a forward hook, which may do anything"
    assert "c3" not in frozen(groups)


def test_hooks_that_only_look_can_be_allowed():
    model, images = built(Chain())
    for module in (model, model.c2):
        module.register_forward_hook(lambda module, inputs, output: None)
    assert set(frozen(check_against_twin(model, images, allow_hooks=True))) == {"fc"}


def test_a_forward_of_an_instances_own_is_looked_into():
    """As wrappers for quantisation and offloading install them."""
    model, images = built(Chain())
    model.c2.forward = MethodType(
        lambda self, x: F.conv2d(x, self.weight, self.bias, self.stride, self.padding).roll(1, 1), model.c2
    )
    model.c3.forward = model.c3.forward
    assert set(frozen(check_against_twin(model, images))) == {"c2", "fc"}


# --- several inputs and outputs ---


@dataclass
class Outputs:
    logits: torch.Tensor
    features: tuple[torch.Tensor, ...] = ()


class Several(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.left, self.right, self.joint, self.fc = conv(3, 8), conv(1, 8), conv(16, 6), nn.Linear(6, 5)
        self.give = give

    def forward(self, image, depth, scale=None):
        joined = torch.cat([self.left(image), self.right(depth["map"])], 1)
        y = self.joint(F.relu(joined))
        y = y if scale is None else y * scale[:, None, None, None]
        return self.give(self.fc(y.mean((2, 3))), y)


EXAMPLES = [
    (torch.randn(3, 3, 8, 8), {"map": torch.randn(3, 1, 8, 8)}),
    {"image": torch.randn(3, 3, 8, 8), "depth": {"map": torch.randn(3, 1, 8, 8)}},
    (torch.randn(3, 3, 8, 8), {"map": torch.randn(3, 1, 8, 8)}, torch.arange(3)),
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_several_inputs_are_given_as_a_tuple_or_a_dict(example):
    groups = check_against_twin(randomise(Several(lambda logits, y: logits)), example)
    assert set(frozen(groups)) == {"fc"}
    model = Several(lambda logits, y: logits)
    before = cup.complexity(model, example)
    plan = cup.plan_by_reduction(model, groups, 1.5)
    cup.apply_plan(model, plan, groups)
    assert cup.complexity(model, example).flops < before.flops / 1.4


@pytest.mark.parametrize(
    "give",
    [
        lambda logits, y: {"logits": logits, "features": [y]},
        lambda logits, y: (logits, [(y, None)], "a name"),
        lambda logits, y: Outputs(logits, (y,)),
    ],
)
def test_all_tensors_in_an_output_are_outputs(give):
    groups = cup.channel_groups(Several(give), EXAMPLES[0])
    assert frozen(groups)["joint"] == frozen(groups)["fc"] == "it is an output of the network"
    assert "left" not in frozen(groups)


# --- what is no network of its own, and what does not fit ---


@pytest.mark.parametrize("ask", [cup.channel_groups, cup.complexity, cup.describe])
def test_wrappers_are_refused_by_name(ask):
    images = torch.empty(1, 3, 8, 8)
    with pytest.raises(cup.CupError, match=r"DataParallel.*give model\.module"):
        ask(nn.DataParallel(Chain()), images)
    with pytest.raises(cup.CupError, match=r"OptimizedModule.*give model\._orig_mod"):
        ask(torch.compile(Chain()), images)


def test_a_model_is_not_cut_while_ddp_holds_it(tmp_path):
    model, images = built(Chain())
    groups = cup.channel_groups(model, images)
    plan = cup.plan_by_counts(model, groups, {"c1": 7})
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(cup.CupError, match="DDP holds this Chain"):
            cup.apply_plan(model, plan, groups)
        with pytest.raises(cup.CupError, match=r"give model\.module"):
            cup.apply_plan(wrapped, plan, groups)
        assert model.c1.out_channels == 16
        wrapped.itself = wrapped  # garbage, once it is dropped, that only the collector finds
        del wrapped
        cup.apply_plan(model, plan, groups)
        assert model.c1.out_channels == 7
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ask", [cup.channel_groups, cup.complexity])
def test_lazy_modules_without_shapes_are_refused(ask):
    with pytest.raises(cup.CupError, match=r"0\.weight has no shape yet: run the network once"):
        ask(nn.Sequential(nn.LazyConv2d(4, 3)), torch.empty(1, 3, 8, 8))


@pytest.mark.parametrize("ask", [cup.channel_groups, cup.complexity])
@pytest.mark.parametrize("example", [3, (), {"x": 2}, "images"])
def test_an_example_without_tensors_is_refused(ask, example):
    with pytest.raises(cup.CupError, match="example_input: found"):
        ask(Chain(), example)
