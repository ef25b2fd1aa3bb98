"""Slow, plain twins of what cup/ does, and the small networks that its tests share.

No twin uses the planners, the masks or the surgery of cup/: groups and plans are read as plain data only.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from torch import nn

from cup import ChannelGroup, PrunePlan, apply_plan, channel_groups
from cup.tracing.meta import arguments, map_tensors, tensors_in
from launch.benches.foreign.twins import silenced_copy
from train.network.models import build_model

# --- networks made by hand ---


class MobileLike(nn.Module):
    """Expand, depthwise, project; the second block has two channels for each depthwise input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(6, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 8, 1)
        self.widen = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.bn3 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.bn1(self.expand(F.relu(self.stem(x)))))
        x = self.project(F.relu6(self.bn2(self.depthwise(x))))
        x = F.relu(self.bn3(self.widen(x)))
        return self.fc(x.mean((2, 3)))


class DenseLike(nn.Module):
    """Every layer reads all the layers before it through a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(10)
        self.conv3 = nn.Conv2d(10, 5, 3, padding=1)
        self.bn_all = nn.BatchNorm2d(15)
        self.fc = nn.Linear(15 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = F.relu(self.conv1(x))
        two = self.conv2(one)
        three = self.conv3(F.relu(self.bn(torch.cat([one, two], 1))))
        joined = self.bn_all(torch.cat([three, one, two], dim=1))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(joined, 2), 1))


class SqueezeExcite(nn.Module):
    """A gate computed from the channels multiplies the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(10)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(10, 4, 1)
        self.excite = nn.Conv2d(4, 10, 1)
        self.conv2 = nn.Conv2d(10, 7, 3, padding=1)
        self.fc = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(self.pool(x)))))
        return self.fc(self.conv2(gate * x).mean((2, 3)))


class ManyLayers(nn.Module):
    """Layers that go by whole groups (group norm, grouped convolution), and some that are seldom seen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, padding_mode="circular")
        self.group_norm = nn.GroupNorm(4, 12)
        self.prelu = nn.PReLU(12)
        self.grouped = nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=4)
        self.bn = nn.BatchNorm2d(24)
        self.reduce = nn.Conv2d(24, 10, 2, stride=2)
        self.up = nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.instance_norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8).view(8, 1, 1))
        self.mix = nn.Conv1d(8, 9, 3, padding=1)
        self.layer_norm = nn.LayerNorm(9)
        self.widen = nn.Linear(9, 14)
        self.narrow = nn.Linear(14, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.prelu(self.group_norm(self.stem(x))))
        x = self.up(self.reduce(F.relu(self.bn(x))))
        x = self.mix((self.instance_norm(x) * self.scale).flatten(2)).transpose(1, 2)
        return self.fc(F.relu(self.narrow(F.gelu(self.widen(self.layer_norm(x))))).mean(1))


def _vgg16_bn() -> nn.Module:
    """torchvision's VGG-16 with batch norm; its two hidden layers of 4096 are 48 wide here, to be quick."""
    model = torchvision.models.vgg16_bn(num_classes=10)
    model.classifier[0] = nn.Linear(512 * 7 * 7, 48)
    model.classifier[3] = nn.Linear(48, 48)
    model.classifier[6] = nn.Linear(48, 10)
    return model


def _published(name: str) -> Callable[[], nn.Module]:
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return lambda: torchvision.models.get_model(name, num_classes=10, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        name: (_published(name), (3, 64, 64)) for name in ("mobilenet_v2", "squeezenet1_1", "densenet121", "mnasnet0_5")
    },
    **{name: (_published(name), (3, 64, 64)) for name in ("mobilenet_v2", "mnasnet0_5", "efficientnet_b0")},
    **{name: (_published(name), (3, 64, 64)) for name in ("squeezenet1_1", "googlenet", "resnext50_32x4d")},
    **{name: (_published(name), (3, 64, 64)) for name in ("regnet_y_400mf", "convnext_tiny")},
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), (3, 32, 32)),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), (3, 32, 32)),
    "vgg16_bn": (_vgg16_bn, (3, 32, 32)),
    "vgg16_cifar": (lambda: build_model("vgg16_cifar", 10), (3, 32, 32)),
    "resnet20_cifar": (lambda: build_model("resnet20_cifar", 10), (3, 32, 32)),
    "resnet56_cifar": (lambda: build_model("resnet56_cifar", 10), (3, 32, 32)),
    "lenet": (lambda: build_model("lenet", 10), (1, 28, 28)),
    "mlp": (lambda: build_model("mlp", 10), (784,)),
    "mobile_like": (MobileLike, (3, 8, 8)),
    "dense_like": (DenseLike, (3, 8, 8)),
    "squeeze_excite": (SqueezeExcite, (3, 8, 8)),
    "many_layers": (ManyLayers, (3, 8, 8)),
}


def make_network(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """The network with random weights, biases and batch-norm entries, and a batch of 4 for it; dropout does nothing."""
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    return randomise(build()), torch.randn(4, *shape)


def randomise(model: nn.Module) -> nn.Module:
    """Make every channel different from every other, batch-norm entries too, so that a wrong index shows."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(getattr(module, "weight", None), nn.Parameter):
                module.weight.uniform_(0.5, 1.5)
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias.normal_(0, 0.2)
    return model


# --- plans as plain data ---


def random_kept(groups: Sequence[ChannelGroup], seed: int = 0, scope: str = "inner") -> dict[str, tuple[int, ...]]:
    """For every group in scope a random sorted set of channels that stay: some, never all of them."""
    rng = np.random.default_rng(seed)
    kept = {}
    for group in groups:
        if group.width > 1 and not group.frozen and (group.inner or scope == "all"):
            count = int(rng.integers(1, group.width))
            kept[group.name] = tuple(sorted(int(c) for c in rng.choice(group.width, count, replace=False)))
    return kept


def plan_of(groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]) -> PrunePlan:
    widths = {group.name: group.width for group in groups}
    return PrunePlan({n: tuple(c) for n, c in kept.items()}, {name: widths[name] for name in kept})


def groups_as_data(groups: Sequence[ChannelGroup]) -> list[tuple]:
    """Everything about the groups, comparable with ==."""
    places = lambda found: [(p.module, p.axis, p.channel_of_index.tolist()) for p in found]  # noqa: E731
    return [
        (
            g.name,
            g.width,
            g.inner,
            g.frozen,
            places(g.producers),
            places(g.followers),
            places(g.consumers),
            g.network.input_shape,
            [n for n in g.numbers.tolist() if g.network.alive[n]] == g.numbers.tolist(),
        )
        for g in groups
    ]


def check_against_twin(
    model: nn.Module, inputs: Any, seed: int = 0, relative: float = 1e-9, **options: Any
) -> list[ChannelGroup]:
    """Cut a random part of all that may shrink and compare with the silenced full network, in float64 and both modes.

    inputs: as `channel_groups` takes them. Returns the groups.
    """
    groups = channel_groups(model, inputs, **options)
    kept = random_kept(groups, seed, scope="all")
    model = model.double()
    inputs = map_tensors(inputs, lambda value: value.double() if value.is_floating_point() else value)
    twin = silenced_copy(model, groups, kept)
    model = copy.deepcopy(model)
    apply_plan(model, plan_of(groups, kept), groups)
    positional, named = arguments(inputs)
    for mode in (True, False):
        with torch.no_grad():
            found, wanted = (m.train(mode)(*positional, **named) for m in (model, twin))
        for one, other in zip(tensors_in(found), tensors_in(wanted), strict=True):
            assert_close(one, other, relative)
    return groups


def narrowed(
    name: str, tensor: torch.Tensor, groups: Sequence[ChannelGroup], kept: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    """A parameter or buffer (or anything shaped like it) without the rows and columns of the channels that go."""
    owner = name.rpartition(".")[0]
    gone: dict[str, set[int]] = {"out": set(), "in": set()}
    for group in groups:
        for place in group.places:
            if place.module in (owner, name) and group.name in kept:
                stay = {*kept[group.name], -1}
                gone[place.axis] |= {i for i, c in enumerate(place.channel_of_index.tolist()) if c not in stay}
    rows, columns = ("in", "out") if name == "up.weight" else ("out", "in")  # of the one transposed convolution
    if tensor.dim() > 0 and gone[rows]:
        tensor = tensor[[i for i in range(len(tensor)) if i not in gone[rows]]]
    if tensor.dim() > 1 and gone[columns]:
        tensor = tensor[:, [i for i in range(tensor.shape[1]) if i not in gone[columns]]]
    return tensor


def assert_close(found: torch.Tensor, wanted: torch.Tensor, relative: float = 1e-5) -> None:
    """Equal shapes, and no entry off by more than `relative` of the largest."""
    assert found.shape == wanted.shape
    scale = wanted.abs().max().item()
    assert (found - wanted).abs().max().item() <= relative * scale + 1e-12


class Untouched:
    """Remembers a model to the bit; `check` fails if anything about it changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.objects = {name: id(parameter) for name, parameter in model.named_parameters()}
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.text = str(model)

    def check(self) -> None:
        assert {name: id(parameter) for name, parameter in self.model.named_parameters()} == self.objects
        now = self.model.state_dict()
        assert now.keys() == self.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor.nan_to_num(12.5), now[name].nan_to_num(12.5)), name
        assert {name: module.training for name, module in self.model.named_modules()} == self.training
        assert str(self.model) == self.text


# --- the planner, slowly, for a plain chain of layers ---


def slow_plan(
    model: nn.Module, t: float, features: str = "both", use_bias: bool = True, sequential: bool = True
) -> dict[str, tuple[int, ...]]:
    """Kept filters of every layer but the last of a chain of conv and linear layers, by the paper's text."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    weights = [layer.weight.detach().double() for _, layer in layers]
    kept = {}
    for at in range(len(layers) - 1):
        bias = layers[at][1].bias if use_bias else None
        rows = _slow_features(weights[at], bias, weights[at + 1], features)
        kept[layers[at][0]] = stay = _slow_representatives(rows, t)
        if sequential:
            block = _columns_per_filter(weights[at], weights[at + 1])
            columns = [i * block + k for i in stay for k in range(block)]
            weights[at] = weights[at][list(stay)]
            weights[at + 1] = weights[at + 1][:, columns]
    return kept


def _columns_per_filter(weight: torch.Tensor, following: torch.Tensor) -> int:
    return following.shape[1] // weight.shape[0]


def _slow_features(
    weight: torch.Tensor, bias: torch.Tensor | None, following: torch.Tensor, features: str
) -> list[list[float]]:
    block = _columns_per_filter(weight, following)
    rows = []
    for i in range(weight.shape[0]):
        row = []
        if features in ("both", "incoming"):
            row += [float(torch.norm(w) if weight.dim() == 4 else w) for w in weight[i]]
        if bias is not None:
            row.append(float(bias[i].detach()))
        if features in ("both", "outgoing"):
            for o in range(following.shape[0]):
                columns = following[o, i * block : (i + 1) * block]
                signed = weight.dim() == 2 and following.dim() == 2
                row.append(float(columns[0]) if signed else float(torch.norm(columns)))
        rows.append(row)
    return rows


def _slow_representatives(rows: list[list[float]], t: float) -> tuple[int, ...]:
    if len(rows) == 1:
        return (0,)
    labels = fcluster(linkage(pdist(np.array(rows)), "ward"), t, "distance")
    best: dict[int, tuple[float, int]] = {}
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        norm = sum(x * x for x in row) ** 0.5
        if label not in best or norm > best[label][0]:
            best[label] = (norm, i)
    return tuple(sorted(i for _, i in best.values()))
