"""Other people's networks: code that no network of ours has, each kind at its smallest. Twins in float64."""

from dataclasses import dataclass
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
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
