"""Surgery against the masked twin: a full-width network in which no consumer hears the channels that went."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cup_twins import (
    Untouched,
    assert_close,
    groups_as_data,
    make_network,
    narrowed,
    plan_of,
    random_kept,
    silenced_copy,
)
from torch import nn

import cup

# (network, scope of the random cut)
CUTS = [
    *(("resnet18", "inner"), ("resnet18", "all"), ("resnet50", "inner"), ("resnet50", "all"), ("vgg16_bn", "inner")),
    *(
        ("vgg16_cifar", "inner"),
        ("resnet20_cifar", "inner"),
        ("resnet20_cifar", "all"),
        ("lenet", "inner"),
        ("mlp", "inner"),
    ),
    *(("mobile_like", "all"), ("dense_like", "all"), ("squeeze_excite", "all"), ("many_layers", "all")),
]
QUICK = [cut for cut in CUTS if cut[0] not in ("vgg16_bn", "vgg16_cifar", "resnet50")]


def traced(name, seed=0, precise=True):
    """The network with its groups; in double precision, so that only a wrong channel can make a difference."""
    model, images = make_network(name, seed)
    groups = cup.channel_groups(model, images)
    return (model.double(), images.double(), groups) if precise else (model, images, groups)


def assert_same_outputs(model, twin, images):
    """In eval mode, and in train mode, where batch norm takes the batch's own statistics."""
    for train in (False, True):
        with torch.no_grad():
            assert_close(model.train(train)(images), twin.train(train)(images))


@pytest.mark.parametrize(("name", "scope"), [*CUTS, ("regnet_y_400mf", "all")])
def test_random_cuts_equal_the_masked_twin_in_eval_and_in_train_mode(name, scope):
    model, images, groups = traced(name)
    kept = random_kept(groups, seed=3, scope=scope)
    twin = silenced_copy(model, groups, kept)
    cup.apply_plan(model, plan_of(groups, kept), groups)
    assert_same_outputs(model, twin, images)
    wanted = twin.state_dict()
    for key, found in model.state_dict().items():  # running statistics too, updated by that batch
        if "num_batches" not in key:
            assert_close(found, narrowed(key, wanted[key], groups, kept))


@pytest.mark.parametrize("name", ["resnet18", "resnet20_cifar", "lenet", "mlp", "mobile_like"])
def test_the_planners_cut_equals_the_masked_twin_in_eval_and_in_train_mode(name):
    model, images, groups = traced(name)
    widths = {group.name: group.width for group in cup.prunable_groups(groups)}
    plan = cup.plan_by_counts(model, groups, {name: 1 + 2 * width // 5 for name, width in widths.items()})
    twin = silenced_copy(model, groups, plan.kept)
    cup.apply_plan(model, plan, groups)
    assert_same_outputs(model, twin, images)


def test_single_precision_is_as_good_as_single_precision_gets():
    model, images, groups = traced("resnet18", precise=False)
    kept = random_kept(groups, scope="all")
    twin = silenced_copy(model, groups, kept).eval()
    cup.apply_plan(model.eval(), plan_of(groups, kept), groups)
    with torch.no_grad():
        assert_close(model(images), twin(images))


@pytest.mark.parametrize(("name", "scope"), QUICK)
def test_one_sgd_step_after_a_resize_equals_the_narrowed_step_of_the_masked_twin(name, scope):
    model, images, groups = traced(name)
    labels = torch.tensor([0, 3, 1, 2])
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    optimizer = torch.optim.SGD(model.parameters(), **settings)

    def step(network, sgd):
        sgd.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        sgd.step()

    model.train()
    for _ in range(2):
        step(model, optimizer)
    kept = random_kept(groups, seed=5, scope=scope)
    twin = silenced_copy(model, groups, kept)
    twin_optimizer = torch.optim.SGD(twin.parameters(), **settings)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    cup.carry_optimizer(optimizer, cup.apply_plan(model, plan_of(groups, kept), groups))
    step(model, optimizer)
    step(twin, twin_optimizer)

    wanted = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        assert_close(parameter.detach(), narrowed(key, wanted[key].detach(), groups, kept))
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.abs().max() > 0
        assert_close(momentum, narrowed(key, twin_optimizer.state[wanted[key]]["momentum_buffer"], groups, kept))


# --- groups after surgery ---


@pytest.mark.parametrize(("name", "scope"), QUICK)
def test_groups_after_each_of_three_resizes_equal_a_fresh_trace(name, scope):
    model, images, groups = traced(name, precise=False)
    for seed in range(3):
        kept = {n: c if len(c) > 1 else (0, 1) for n, c in random_kept(groups, seed, scope).items()}
        resized = cup.apply_plan(model, plan_of(groups, kept), groups)
        assert groups_as_data(resized.groups) == groups_as_data(cup.channel_groups(model, images))
        assert resized.groups_before is not groups
        assert groups_as_data(resized.groups_before) == groups_as_data(groups)
        groups = resized.groups
    with torch.no_grad():
        model.eval()(images)


def test_surgery_traces_by_itself_when_no_groups_are_given():
    model, _, groups = traced("resnet20_cifar", precise=False)
    by_itself = copy.deepcopy(model)
    plan = plan_of(groups, random_kept(groups))
    cup.apply_plan(model, plan, groups)
    cup.apply_plan(by_itself, plan)
    for one, other in zip(model.state_dict().values(), by_itself.state_dict().values(), strict=True):
        assert torch.equal(one, other)


# --- what surgery keeps ---


def test_only_the_touched_parameters_are_replaced_and_all_are_reported():
    model, _, groups = traced("resnet18", precise=False)
    kept = {"layer2.0.conv1": (0, 5, 127)}
    before = dict(model.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    resized = cup.apply_plan(model, plan_of(groups, kept), groups)
    touched = {"layer2.0.conv1.weight", "layer2.0.bn1.weight", "layer2.0.bn1.bias", "layer2.0.conv2.weight"}
    assert {change.name for change in resized.changes} == touched
    for name, parameter in model.named_parameters():
        assert (parameter is before[name]) == (name not in touched)
    for change in resized.changes:
        assert change.old is before[change.name]
        assert change.new is model.get_parameter(change.name)
        expected = change.old
        for dim, index in change.axes.items():
            expected = expected.index_select(dim, index)
        assert torch.equal(change.new, expected)
    for name, buffer in model.named_buffers():
        wanted = buffers[name][[0, 5, 127]] if name.startswith("layer2.0.bn1.running") else buffers[name]
        assert torch.equal(buffer, wanted)


def test_a_plan_that_removes_nothing_replaces_nothing():
    model, _, groups = traced("resnet20_cifar", precise=False)
    before = Untouched(model)
    everything = {group.name: range(group.width) for group in groups}
    assert cup.apply_plan(model, plan_of(groups, everything), groups).changes == ()
    before.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_dtype_memory_format_and_requires_grad_are_kept(dtype, layout):
    model, _, groups = traced("resnet18", precise=False)
    model = model.to(dtype=dtype, memory_format=layout)
    frozen = {"layer1.0.conv1.weight", "layer1.0.bn1.bias", "layer3.0.conv2.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in frozen
        parameter.grad = torch.ones_like(parameter)
    resized = cup.apply_plan(model, plan_of(groups, random_kept(groups, scope="all")), groups)
    assert frozen <= {change.name for change in resized.changes}
    for change in resized.changes:
        assert isinstance(change.new, nn.Parameter)
        assert change.new.is_leaf
        assert change.new.dtype == dtype
        assert change.new.requires_grad == (change.name not in frozen)
        assert change.new.grad is None
        if change.new.dim() == 4:
            assert change.new.is_contiguous(memory_format=layout)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == (torch.int64 if "num_batches" in name else dtype)


def test_hooks_are_kept():
    """Of the modules, and of the tensors that are replaced."""
    model, images, groups = traced("lenet", precise=False)
    seen = []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append("module"))
    model.conv1.weight.register_hook(lambda gradient: seen.append(("gradient", len(gradient))))
    model.conv1.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(("accumulated", len(weight))))
    cup.apply_plan(model, cup.plan_by_counts(model, groups, {"conv1": 4}), groups)
    model(images).sum().backward()
    assert seen == ["module", ("gradient", 4), ("accumulated", 4)]


def test_layers_say_their_new_widths():
    model, _, groups = traced("mobile_like", precise=False)
    cup.apply_plan(model, plan_of(groups, {"stem": (0,), "expand": (1, 2, 11), "project": (4, 7)}), groups)
    assert (model.stem.out_channels, model.expand.in_channels, model.expand.out_channels) == (1, 1, 3)
    assert model.bn1.num_features == model.bn2.num_features == 3
    depthwise, widen = model.depthwise, model.widen
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 3, 3)
    assert (widen.in_channels, widen.out_channels, widen.groups) == (2, 4, 2)
    assert model.bn3.num_features == model.fc.in_features == 4


def test_batch_norm_without_weights_or_statistics_is_resized():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(8, track_running_stats=False)]
    layers = [nn.Conv2d(3, 6, 3), norms[0], nn.ReLU(), nn.Conv2d(6, 8, 3), norms[1], nn.Flatten(), nn.Linear(128, 3)]
    model, images = nn.Sequential(*layers), torch.randn(2, 3, 8, 8)
    groups = cup.channel_groups(model, images)
    kept = random_kept(groups)
    twin = silenced_copy(model, groups, kept)
    cup.apply_plan(model, plan_of(groups, kept), groups)
    assert_close(model(images), twin(images))


# --- shrink_to ---


@pytest.mark.parametrize(("name", "scope"), QUICK)
def test_shrink_to_gives_the_plans_shapes_and_the_stored_weights_load(name, scope):
    model, images, groups = traced(name, precise=False)
    plan = plan_of(groups, random_kept(groups, scope=scope))
    cup.apply_plan(model, plan, groups)
    fresh, _ = make_network(name, seed=9)
    cup.shrink_to(fresh, plan.new_widths, images)
    fresh.load_state_dict(model.state_dict())
    assert str(fresh) == str(model)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), model.eval()(images))


def test_shrink_to_finds_the_input_shape_by_itself():
    model, images = make_network("vgg16_cifar")
    cup.shrink_to(model, {"features.0": 5, "features.40": 7})
    assert model(images).shape == (4, 10)
    assert (model.features[0].out_channels, model.classifier.in_features) == (5, 7)


# --- other people's networks ---


@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_a_network_that_we_did_not_write_still_computes_what_its_masked_twin_does(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=10, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    groups = cup.channel_groups(model, images)
    model, images = model.double(), images.double()
    kept = random_kept(groups, scope="all")
    assert kept
    twin = silenced_copy(model, groups, kept)
    cup.apply_plan(model, plan_of(groups, kept), groups)
    with torch.no_grad():
        assert_close(model(images), twin(images))
