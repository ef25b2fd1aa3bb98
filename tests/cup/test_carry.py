"""What belongs to the parameters goes through a resize with them: optimizer state and moving averages."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cup_twins import assert_close, make_network, narrowed, plan_of, random_kept, silenced_copy

import cup


class Lamb(torch.optim.Optimizer):
    """Adam whose step is scaled by a trust ratio of each parameter, which it keeps as a tensor of one element."""

    def __init__(self, params, foreach=False):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "trust_ratio": torch.ones(1)}
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad, 0.1)
                parameter.sub_(state["exp_avg"] * state["trust_ratio"].to(parameter), alpha=group["lr"])


MAKERS = {
    "SGD": lambda p, **k: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4, **k),
    "SGD nesterov": lambda p, **k: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, **k),
    "Adam": lambda p, **k: torch.optim.Adam(p, lr=1e-3, amsgrad=True, **k),
    "AdamW": lambda p, **k: torch.optim.AdamW(p, lr=1e-3, **k),
    "RMSprop": lambda p, **k: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, **k),
    "NAdam": lambda p, **k: torch.optim.NAdam(p, lr=1e-3, **k),
    "Adagrad": lambda p, **k: torch.optim.Adagrad(p, lr=1e-3, **k),
    "Adadelta": lambda p, **k: torch.optim.Adadelta(p, lr=1e-3, **k),
    "LAMB-like": lambda p, **k: Lamb(p, **k),
}
WAYS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
FUSED = ("SGD", "SGD nesterov", "Adam", "AdamW", "Adagrad")
OPTIMIZERS = [(kind, way) for kind in MAKERS for way in WAYS if way != "fused" or kind in FUSED]


def trained(name, make_optimizer, steps=2):
    """A network after a few steps, with its groups, its optimizer and the function that takes a step."""
    model, images = make_network(name)
    groups = cup.channel_groups(model, images)
    model.double().train()
    optimizer = make_optimizer(model)
    labels = torch.arange(len(images)) % 5

    def step(network, its_optimizer):
        its_optimizer.zero_grad()
        F.cross_entropy(network(images.double()), labels).backward()
        its_optimizer.step()

    for _ in range(steps):
        step(model, optimizer)
    return model, groups, optimizer, step


def snapshot(optimizer):
    """The optimizer's state by parameter identity, its groups, and its tensors' contents."""
    groups = [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]
    state = {
        id(parameter): {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entries.items()}
        for parameter, entries in optimizer.state.items()
    }
    return groups, state


def assert_same_snapshot(found, wanted):
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    for key, entries in wanted[1].items():
        assert found[1][key].keys() == entries.keys()
        for name, value in entries.items():
            same = torch.equal(found[1][key][name], value) if isinstance(value, torch.Tensor) else True
            assert same and (isinstance(value, torch.Tensor) or found[1][key][name] == value)


@pytest.mark.parametrize(("kind", "way"), OPTIMIZERS)
def test_state_is_sliced_like_its_parameter_and_the_next_step_equals_the_masked_twins(kind, way):
    # A network without biases before batch norm: their gradients are rounding noise, which RMSprop blows up.
    model, groups, optimizer, step = trained("squeeze_excite", lambda m: MAKERS[kind](m.parameters(), **WAYS[way]))
    kept = random_kept(groups, seed=4, scope="all")
    twin = silenced_copy(model, groups, kept)
    twin_optimizer = MAKERS[kind](twin.parameters(), **WAYS[way])
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    cup.carry_optimizer(optimizer, cup.apply_plan(model, plan_of(groups, kept), groups))

    def compare():
        wanted = dict(twin.named_parameters())
        assert set(optimizer.state) == set(model.parameters()), "state of the parameters there are, and of no others"
        for name, parameter in model.named_parameters():
            found, expected = optimizer.state[parameter], twin_optimizer.state[wanted[name]]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert_close(found[key], narrowed(name, value, groups, kept) if value.numel() > 1 else value)
                else:
                    assert found[key] == value

    compare()
    step(model, optimizer)
    step(twin, twin_optimizer)
    compare()
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), narrowed(name, twin.get_parameter(name).detach(), groups, kept))


def test_parameter_groups_keep_their_order_and_options():
    def two_groups(model):
        norms = [p for n, p in model.named_parameters() if "bn" in n]
        rest = [p for n, p in model.named_parameters() if "bn" not in n]
        return torch.optim.SGD(
            [{"params": norms, "weight_decay": 0.0}, {"params": rest, "lr": 0.5}], lr=0.1, momentum=0.9
        )

    model, groups, optimizer, _ = trained("resnet20_cifar", two_groups)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    names = {id(p): n for n, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    cup.carry_optimizer(optimizer, cup.apply_plan(model, plan_of(groups, random_kept(groups)), groups))

    names = {id(p): n for n, p in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == order
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options


def test_state_of_untouched_parameters_is_the_same_object():
    model, groups, optimizer, _ = trained("resnet20_cifar", lambda m: MAKERS["SGD"](m.parameters()))
    before = {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
    resized = cup.apply_plan(model, plan_of(groups, {"layer2.1.conv1": (0, 3, 30)}), groups)
    cup.carry_optimizer(optimizer, resized)
    changed = {change.name for change in resized.changes}
    for name, parameter in model.named_parameters():
        if name not in changed:
            assert optimizer.state[parameter]["momentum_buffer"] is before[parameter]


def test_momentum_keeps_memory_format_and_dtype():
    model, images = make_network("resnet20_cifar")
    groups = cup.channel_groups(model, images)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(images).sum().backward()
    optimizer.step()
    resized = cup.apply_plan(model, plan_of(groups, random_kept(groups)), groups)
    cup.carry_optimizer(optimizer, resized)
    for change in resized.changes:
        momentum = optimizer.state[change.new]["momentum_buffer"]
        assert momentum.dtype == torch.float32
        if momentum.dim() == 4:
            assert momentum.is_contiguous(memory_format=torch.channels_last)


def test_an_optimizer_that_has_not_stepped_yet_steps_after_a_resize():
    model, groups, optimizer, step = trained("dense_like", lambda m: MAKERS["AdamW"](m.parameters()), steps=0)
    cup.carry_optimizer(optimizer, cup.apply_plan(model, plan_of(groups, random_kept(groups)), groups))
    assert not optimizer.state
    step(model, optimizer)
    assert set(optimizer.state) == set(model.parameters())


def test_parameters_that_the_optimizer_does_not_hold_are_passed_over():
    def some(model):
        return MAKERS["SGD"]([p for n, p in model.named_parameters() if n.startswith(("conv2", "fc"))])

    model, groups, optimizer, step = trained("dense_like", some)
    resized = cup.apply_plan(model, plan_of(groups, random_kept(groups)), groups)
    cup.carry_optimizer(optimizer, resized)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    expected = [p for n, p in model.named_parameters() if n.startswith(("conv2", "fc"))]
    assert [id(p) for p in held] == [id(p) for p in expected]
    assert set(optimizer.state) == set(expected)
    step(model, optimizer)


def test_a_scheduler_on_the_optimizer_goes_on_working():
    model, groups, optimizer, step = trained("dense_like", lambda m: MAKERS["SGD"](m.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    cup.carry_optimizer(optimizer, cup.apply_plan(model, plan_of(groups, random_kept(groups)), groups))
    before = model.fc.weight.detach().clone()
    step(model, optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert not torch.equal(before, model.fc.weight)


@pytest.mark.parametrize("steps", [1, 2])
def test_state_that_cannot_be_mapped_is_an_error_and_leaves_the_optimizer_alone(steps):
    """Adafactor keeps row and column sums, which are shaped unlike their parameter."""
    model, groups, optimizer, _ = trained("dense_like", lambda m: torch.optim.Adafactor(m.parameters()), steps)
    before = snapshot(optimizer)
    with pytest.raises(cup.CupError, match="row_var"):
        cup.check_optimizer(optimizer)  # before the model is changed
    resized = cup.apply_plan(model, plan_of(groups, random_kept(groups)), groups)
    with pytest.raises(cup.CupError, match="row_var") as caught:
        cup.carry_optimizer(optimizer, resized)
    assert "\n" not in str(caught.value)
    assert_same_snapshot(snapshot(optimizer), before)


def test_a_history_of_the_whole_network_cannot_be_mapped():
    """L-BFGS keeps it under its first parameter, which the resize may not even touch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def loss():
        optimizer.zero_grad()
        value = model(torch.eye(3)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    resized = cup.apply_plan(model, cup.plan_by_counts(model, cup.channel_groups(model), {"1": 2}))
    with pytest.raises(cup.CupError, match="LBFGS keeps a history"):
        cup.carry_optimizer(optimizer, resized)
    assert optimizer.param_groups[0]["params"][2] is resized.changes[0].old


def test_one_bad_entry_at_the_end_leaves_the_optimizer_alone():
    model, groups, optimizer, _ = trained("dense_like", lambda m: MAKERS["SGD"](m.parameters()))
    resized = cup.apply_plan(model, plan_of(groups, random_kept(groups)), groups)
    optimizer.state[resized.changes[-1].old]["momentum_buffer"] = torch.zeros(3, 2, 1)
    before = snapshot(optimizer)
    with pytest.raises(cup.CupError, match=r"momentum_buffer.*\(3, 2, 1\)"):
        cup.carry_optimizer(optimizer, resized)
    assert_same_snapshot(snapshot(optimizer), before)


# --- moving averages ---


def averaged(model, decay=0.9):
    return torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
    )


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_moving_average_loses_the_same_channels_and_goes_on_averaging(wrapped):
    model, images = make_network("resnet20_cifar")
    groups = cup.channel_groups(model, images)
    ema = averaged(model)
    other, _ = make_network("resnet20_cifar", seed=8)
    ema.update_parameters(model)
    ema.update_parameters(other)
    inner = ema.module
    stored = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    kept = random_kept(groups)

    resized = cup.apply_plan(model, plan_of(groups, kept), groups)
    cup.carry_ema(ema if wrapped else inner, resized)

    for name, tensor in inner.state_dict().items():
        assert torch.equal(tensor, narrowed(name, stored[name], groups, kept)), name
    assert {n: t.shape for n, t in inner.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert int(ema.n_averaged) == 2
    before = inner.conv1.weight.clone()
    ema.update_parameters(model)
    assert_close(inner.conv1.weight, 0.9 * before + 0.1 * model.conv1.weight.detach())
    inner.eval()(images)


def test_a_moving_average_at_other_widths_is_an_error_and_is_left_alone():
    model, images = make_network("resnet20_cifar")
    groups = cup.channel_groups(model, images)
    ema = averaged(model)
    cup.shrink_to(ema.module, {"layer3.2.conv1": 9}, images)
    stored = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    resized = cup.apply_plan(model, plan_of(groups, random_kept(groups)), groups)
    with pytest.raises(cup.CupError):
        cup.carry_ema(ema, resized)
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
