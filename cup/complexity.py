"""FLOPs, MACs and parameters of every layer, from one forward pass on the meta device.

Two ways of counting stand side by side. `flops` is the paper's (authors' notebooks): convolution and linear 2 per
multiply-add and 1 per bias, batch norm 2 per element, ReLU modules 1 per element, max and average pooling modules 1
per window element (adaptive pooling counts nothing). `macs` is plain multiply-adds of convolution and linear layers.
ReLU and pooling called as functions are counted by neither, as in the reference. Products outside of those layers (the
attention of a transformer), which the reference does not speak of, are counted by both: 2 per multiply-add, and 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cup.groups import Call, ChannelGroup, alive_after, keep_masks
from cup.layers import CONVS, TRANSPOSED_CONVS, find_layer, weight_of
from cup.meta import meta_copy, meta_input
from cup.plan import PrunePlan

OUTSIDE = "(products outside of layers)"


@dataclass(frozen=True)
class LayerCost:
    """One module's cost for one sample, all its calls together."""

    name: str
    kind: str
    flops: int
    macs: int
    params: int


@dataclass(frozen=True)
class Complexity:
    """Cost of one forward pass of one sample."""

    layers: tuple[LayerCost, ...]
    flops: int
    """The paper's counting."""
    macs: int
    """Multiply-adds of convolutions, linear layers and other products."""
    params: int
    """Parameters of the whole network, each counted once."""


def complexity(model: nn.Module, example_input: torch.Tensor) -> Complexity:
    """Count `model` on one sample shaped like example_input (N, ...); the model is neither run nor changed.

    Layers stand in the order of their first call; products outside of layers are one more, named OUTSIDE, at the end.
    """
    return _count(meta_copy(model), meta_input(example_input.shape[1:], batch=1))


def flops_after(model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan, now: Complexity) -> int:
    """FLOPs (the paper's counting) that the model would have after `plan`, by arithmetic on the traced calls.

    now: `complexity` of the model as it is, at the input shape of the groups' trace. Nothing is run or changed.
    """
    return now.flops + sum(flops for flops, _ in _changes(model, groups, plan, now).values())


def complexity_after(model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan, now: Complexity) -> Complexity:
    """What `complexity` will count once `plan` is applied; the arguments are those of `flops_after`."""
    changes = _changes(model, groups, plan, now)
    removed = _removed_parameters(model, groups, plan)
    layers = []
    for layer in now.layers:
        flops, macs = changes.get(layer.name, (0, 0))
        params = layer.params - removed.get(layer.name, 0)
        layers.append(LayerCost(layer.name, layer.kind, layer.flops + flops, layer.macs + macs, params))
    return Complexity(
        layers=tuple(layers),
        flops=sum(layer.flops for layer in layers),
        macs=sum(layer.macs for layer in layers),
        params=now.params - sum(removed.values()),
    )


def _changes(
    model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan, now: Complexity
) -> dict[str, tuple[int, int]]:
    """Layer -> by how much its FLOPs and MACs change, for the layers that the plan touches."""
    network = groups[0].network
    alive = alive_after(groups, plan.kept)
    counted = {layer.name for layer in now.layers}  # auxiliary heads are traced, but not part of inference
    changes: dict[str, tuple[int, int]] = {}
    for call in network.calls:
        before, after = _shapes(call, network.alive), _shapes(call, alive)
        if call.module in counted and before != after:
            layer, (flops, macs) = model.get_submodule(call.module), changes.get(call.module, (0, 0))
            old, new = _cost(layer, *before), _cost(layer, *after)
            changes[call.module] = (flops + new[0] - old[0], macs + new[1] - old[1])
    return changes


def _removed_parameters(model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan) -> dict[str, int]:
    """Layer, or free parameter, -> how many of its parameters the plan removes."""
    masks = keep_masks((group, plan.kept[group.name]) for group in groups if group.name in plan.removed)
    removed = {}
    for name in {name for name, _ in masks}:
        layer = find_layer(model, name)
        stays = {axis: masks[name, axis] for axis in ("in", "out") if (name, axis) in masks}
        weight = weight_of(layer)
        before = after = 0 if weight is None else weight.numel()
        for mask in stays.values():
            after = after // len(mask) * int(mask.sum())
        if "out" in stays and getattr(layer, "bias", None) is not None:
            before, after = before + len(stays["out"]), after + int(stays["out"].sum())
        removed[name] = before - after
    return removed


def _shapes(call: Call, alive: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input and output shape of the call when only the `alive` channels are left."""

    def narrowed(shape: tuple[int, ...], channels: np.ndarray | None, dim: int) -> tuple[int, ...]:
        return shape if channels is None else (*shape[:dim], int(alive[channels].sum()), *shape[dim + 1 :])

    return (
        narrowed(call.input_shape, call.reads, call.read_dim),
        narrowed(call.output_shape, call.writes, call.write_dim),
    )


def _count(twin: nn.Module, sample: torch.Tensor) -> Complexity:
    """Run a meta twin once and add up what its modules see; the twin is used up."""
    names = {module: name for name, module in twin.named_modules()}
    costs: dict[str, LayerCost] = {}

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        name = names[module]
        flops, macs = _cost(module, tuple(inputs[0].shape), tuple(output.shape))
        before = costs.get(name, LayerCost(name, type(module).__name__, 0, 0, _own_parameters(module)))
        costs[name] = LayerCost(name, before.kind, before.flops + flops, before.macs + macs, before.params)

    for module in twin.modules():
        if isinstance(module, _COUNTED) or not any(True for _ in module.children()):
            module.register_forward_hook(count)
        if type(module) in _BATCH_NORMS:
            module.forward = lambda value: value  # shapes pass unchanged; torch's own meta kernel is slow Python
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as products:
        twin.eval()(sample)
    outside = products.get_total_flops() // 2 - sum(cost.macs for cost in costs.values())
    if outside > 0:
        costs[OUTSIDE] = LayerCost(OUTSIDE, "products", 2 * outside, outside, 0)
    layers = tuple(costs.values())
    return Complexity(
        layers=layers,
        flops=sum(layer.flops for layer in layers),
        macs=sum(layer.macs for layer in layers),
        params=sum(parameter.numel() for parameter in twin.parameters()),
    )


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_RELUS, _POOLS = (nn.ReLU, nn.ReLU6), (nn.MaxPool2d, nn.AvgPool2d)
_COUNTED = (*CONVS, nn.Linear, *_BATCH_NORMS, *_RELUS, *_POOLS)


def _cost(module: nn.Module, value: tuple[int, ...], output: tuple[int, ...]) -> tuple[int, int]:
    """(flops, macs) of one call, from the shapes of its input and output."""
    elements = math.prod(output)
    if isinstance(module, TRANSPOSED_CONVS):
        macs = math.prod(value) * output[1] // module.groups * math.prod(module.kernel_size)
        return 2 * macs + (elements if module.bias is not None else 0), macs
    if isinstance(module, CONVS):
        inputs = value[1] if module.groups == 1 else module.in_channels // module.groups
        macs = elements * inputs * math.prod(module.kernel_size)
        return 2 * macs + (elements if module.bias is not None else 0), macs
    if isinstance(module, nn.Linear):
        macs = elements * value[-1]
        return 2 * macs + (elements if module.bias is not None else 0), macs
    if isinstance(module, _BATCH_NORMS):
        return 2 * math.prod(value), 0
    if isinstance(module, _RELUS):
        return math.prod(value), 0
    if isinstance(module, _POOLS):
        side = module.kernel_size
        return elements * (side * side if isinstance(side, int) else math.prod(side)), 0
    return 0, 0


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
