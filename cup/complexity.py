"""FLOPs, MACs and parameters of every layer, from one forward pass on the meta device.

Two ways of counting stand side by side. `flops` is the paper's (authors' notebooks): convolution and linear 2 per
multiply-add and 1 per bias, batch norm 2 per element, ReLU modules 1 per element, max and average pooling modules 1
per window element (adaptive pooling counts nothing). `macs` is plain multiply-adds of convolution and linear layers.
ReLU and pooling called as functions are counted by neither, as in the reference. Products outside of those layers (the
attention of a transformer), which the reference does not speak of, are counted by both: 2 per multiply-add, and 1.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cup.blocks import drop, groups_without
from cup.errors import CupError
from cup.plan import PrunePlan
from cup.tracing.groups import (
    OUTSIDE,
    Call,
    ChannelGroup,
    Network,
    alive_after,
    is_within,
    keep_masks,
)
from cup.tracing.heads import CutAttention
from cup.tracing.layers import CONVS, TRANSPOSED_CONVS, bias_of, find_layer, has_no_tensors, weight_of
from cup.tracing.meta import (
    Sample,
    arguments,
    check_model,
    does_not_take,
    meta_copy,
    meta_input,
    sample_of,
    tensors_in,
)
from cup.tracing.narrowing import narrow_layers


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


def complexity(model: nn.Module, example_input: Any) -> Complexity:
    """Count `model` on one sample shaped like example_input; the model is neither run nor changed.

    example_input: as of `channel_groups`: tensor (N, ...), or a tuple or dict of several inputs.
    Layers stand in the order of their first call; products outside of layers are one more, named OUTSIDE, at the end.
    Code that branches on a tensor's entries (`if mask.all()`) is counted on both sides, which must cost the same.
    Raises CupError if the model does not take such inputs, costs more or less by their entries, or is a wrapper around
    a network.
    """
    check_model(model)
    return _count(meta_copy(model), sample_of(example_input))


def flops_after(model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan, now: Complexity) -> int:
    """FLOPs (the paper's counting) that the model would have after `plan`, by arithmetic on the traced calls.

    now: `complexity` of the model as it is, at the input shape of the groups' trace. Nothing is run or changed.
    Where the plan drops blocks, by `complexity_after`: the trace does not see the products of every block.
    """
    if plan.dropped:
        return complexity_after(model, groups, plan, now).flops
    return FlopsByWidths(model, groups, now).after(plan.kept)


def complexity_after(model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan, now: Complexity) -> Complexity:
    """What `complexity` will count once `plan` is applied; the arguments are those of `flops_after`.

    Where the plan drops blocks, by a forward pass without them on the meta device.
    """
    if plan.dropped:
        return _count(_smaller_twin(model, groups, plan), groups[0].network.input_shape)
    changes = FlopsByWidths(model, groups, now).changes(plan.kept)
    removed, repeated = _removed_parameters(model, groups, plan)
    layers = []
    for layer in now.layers:
        flops, macs = changes.get(layer.name, (0, 0))
        params = layer.params - removed.get(layer.name, 0)
        layers.append(LayerCost(layer.name, layer.kind, layer.flops + flops, layer.macs + macs, params))
    return Complexity(
        layers=tuple(layers),
        flops=sum(layer.flops for layer in layers),
        macs=sum(layer.macs for layer in layers),
        params=now.params - sum(removed.values()) + repeated,
    )


class FlopsByWidths:
    """What the network would cost at other widths: each call's cost as a product of the channels it reads and writes.

    Arguments as of `flops_after`. Built once for many plans; one evaluation is two sparse products.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], now: Complexity) -> None:
        self._groups, self._now = groups, now
        network = groups[0].network
        counted = {layer.name for layer in now.layers}  # auxiliary heads are traced, but not part of inference
        calls = [call for call in network.calls if call.module in counted]
        self._names = [call.module for call in calls]
        self._within = [call.within for call in calls]
        self._gone = sum(_flops_in_gone(model, network))
        channels = len(network.alive)
        self._reads, self._fixed_reads = _counting([call.reads for call in calls], channels)
        self._writes, self._fixed_writes = _counting([call.writes for call in calls], channels)
        self._rates = np.array([_rates(model, call) for call in calls], dtype=np.int64)
        self._flops, self._macs = self._costs(network.alive)

    def after(self, kept: Mapping[str, Sequence[int]], dropped: Collection[str] = ()) -> int:
        """FLOPs when of each named group only these channels are left, and these residual blocks are gone.

        Products in functions that the trace does not look into (the attention of torchvision's Swin) are of no block:
        they stay counted.
        """
        flops, _ = self._costs(alive_after(self._groups, kept))
        if dropped:
            flops[[any(is_within(name, block) for block in dropped) for name in self._within]] = 0
        return self._now.flops + int((flops - self._flops).sum())

    def full(self) -> int:
        """FLOPs at the widths of the trace, before any cut, with the blocks that have been dropped since."""
        flops, _ = self._costs(np.ones_like(self._groups[0].network.alive))
        return self._now.flops + int((flops - self._flops).sum()) + self._gone

    def changes(self, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
        """Layer -> by how much its FLOPs and its MACs change."""
        flops, macs = self._costs(alive_after(self._groups, kept))
        changes: dict[str, tuple[int, int]] = {}
        for name, more_flops, more_macs in zip(self._names, flops - self._flops, macs - self._macs, strict=True):
            before = changes.get(name, (0, 0))
            changes[name] = (before[0] + int(more_flops), before[1] + int(more_macs))
        return changes

    def _costs(self, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(flops, macs) of every call, int64."""
        reads, writes = self._reads @ alive + self._fixed_reads, self._writes @ alive + self._fixed_writes
        per_pair, per_written, beside = self._rates.T
        macs = per_pair * reads * writes + per_written * writes
        return 2 * macs + beside * writes, macs


def _counting(axes: Sequence[np.ndarray | None], channels: int) -> tuple[csr_array, np.ndarray]:
    """A matrix that counts each axis's living channels, and 1 for the axes where no channel can go."""
    nothing = np.empty(0, dtype=np.int64)
    columns = np.concatenate([nothing, *(axis for axis in axes if axis is not None)])
    rows = np.repeat(np.arange(len(axes)), [0 if axis is None else len(axis) for axis in axes])
    counts = csr_array((np.ones(len(rows), np.int64), (rows, columns)), shape=(len(axes), channels))
    return counts, np.array([axis is None for axis in axes], dtype=np.int64)


def _rates(model: nn.Module, call: Call) -> tuple[int, int, int]:
    """MACs for each pair of a read and a written channel, MACs and other FLOPs for each written channel.

    An axis where no channel can go counts as one channel.
    """
    if call.module == OUTSIDE:
        return 0, call.macs // (1 if call.writes is None else len(call.writes)), 0
    layer = model.get_submodule(call.module)
    flops, macs = _cost(layer, call.input_shape, call.output_shape)
    reads = 1 if call.reads is None else len(call.reads)
    writes = 1 if call.writes is None else len(call.writes)
    mixes = isinstance(layer, _LINEAR) or (isinstance(layer, CONVS) and layer.groups == 1)
    beside = (flops - 2 * macs) // writes
    return (macs // (reads * writes), 0, beside) if mixes else (0, macs // writes, beside)


def _flops_in_gone(model: nn.Module, network: Network) -> Iterator[int]:
    """FLOPs at the widths of the trace of each call in the blocks that have been dropped."""
    gone = {} if network.dense is None else network.dense.gone
    for call in network.before_drops.calls if gone else ():
        if any(is_within(call.within, block) for block in gone):
            yield 2 * call.macs or _cost(network.find(model, call.module), call.input_shape, call.output_shape)[0]


def _smaller_twin(model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan) -> nn.Module:
    """On the meta device, without the blocks and channels that the plan takes."""
    twin, staying = meta_copy(model), groups_without(model, groups, plan.dropped)
    drop(twin, plan.dropped)
    narrow_layers(twin, keep_masks((group, plan.kept[group.name]) for group in staying if group.name in plan.removed))
    return twin


def _removed_parameters(
    model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan
) -> tuple[dict[str, int], int]:
    """Layer, or free parameter, -> how many of its parameters the plan removes; and how many of these are in it twice,
    in layers with tied weights.
    """
    masks = keep_masks((group, plan.kept[group.name]) for group in groups if group.name in plan.removed)
    removed: dict[str, int] = {}
    counted: set[int] = set()
    repeated = 0
    for name in dict.fromkeys(name for name, _ in masks):
        layer = find_layer(model, name)
        is_buffer = isinstance(layer, torch.Tensor) and not isinstance(layer, nn.Parameter)
        if is_buffer or has_no_tensors(layer):
            continue
        stays = {axis: masks[name, axis] for axis in ("in", "out") if (name, axis) in masks}
        weight = weight_of(layer)
        before = after = 0 if weight is None else weight.numel()
        for mask in stays.values():
            after = after // len(mask) * int(mask.sum())
        repeated += before - after if id(weight) in counted else 0
        counted.add(id(weight))
        if "out" in stays and bias_of(layer) is not None:
            before, after = before + len(stays["out"]), after + int(stays["out"].sum())
        removed[name] = before - after
    return removed, repeated


def _count(twin: nn.Module, sample: Sample) -> Complexity:
    """Run a meta twin once on one sample and add up what its modules see; the twin is used up."""
    names = {module: name for name, module in twin.named_modules()}
    costs: dict[str, LayerCost] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any], output: Any) -> None:
        name = names[module]
        counted = isinstance(module, _COUNTED)
        read = next(tensors_in((inputs, named_inputs)), None)
        written = next(tensors_in(output), None)  # of a pooling's values and indices the values
        flops, macs = _cost(module, tuple(read.shape), tuple(written.shape)) if counted else (0, 0)
        if isinstance(module, CutAttention):
            flops, macs = _projections(module, tuple(tensors_in((inputs, named_inputs)))[:3])
        before = costs.get(name, LayerCost(name, type(module).__name__, 0, 0, _own_parameters(module)))
        costs[name] = LayerCost(name, before.kind, before.flops + flops, before.macs + macs, before.params)

    for module in twin.modules():
        if isinstance(module, _COUNTED) or not any(True for _ in module.children()):
            module.register_forward_hook(count, with_kwargs=True)
        if type(module) in _BATCH_NORMS:
            module.forward = lambda value: value  # shapes pass unchanged; torch's own meta kernel is slow Python
    twin.requires_grad_(False)  # torch's counter wants the history of every parameter's view that needs gradients

    def run(answer: Callable[[int], bool]) -> tuple[tuple[LayerCost, ...], int]:
        costs.clear()
        positional, named = arguments(meta_input(sample, batch=1))
        products, answers = FlopCounterMode(display=False), _Answers(answer)
        with torch.no_grad(), torch.device("meta"), answers, products:
            twin.eval()(*positional, **named)
        outside = products.get_total_flops() // 2 - sum(cost.macs for cost in costs.values())
        if outside > 0:
            costs[OUTSIDE] = LayerCost(OUTSIDE, "products", 2 * outside, outside, 0)
        return tuple(costs.values()), answers.asked

    layers = _same_whatever_is_answered(run, twin, sample)
    return Complexity(
        layers=layers,
        flops=sum(layer.flops for layer in layers),
        macs=sum(layer.macs for layer in layers),
        params=sum(parameter.numel() for parameter in twin.parameters()),
    )


def _same_whatever_is_answered(
    run: Callable[[Callable[[int], bool]], tuple[tuple[LayerCost, ...], int]], twin: nn.Module, sample: Sample
) -> tuple[LayerCost, ...]:
    """What a pass costs; where the code asks about entries, with both answers, but for those that the code refuses.

    run: takes what answers the question of a number, gives the costs and how many questions there were. Several
    questions are answered alike, and the first of them each unlike the others.
    """
    found: list[tuple[LayerCost, ...]] = []
    refused: Exception | None = None
    most = 0
    ways: list[Callable[[int], bool]] = [lambda number: False, lambda number: True]
    while ways:
        try:
            layers, asked = run(ways.pop(0))
        except CupError:
            raise
        except Exception as error:  # whatever a network's own code raises for a wrong shape, or a wrong entry
            refused = refused or error
            continue
        found.append(layers)
        if not asked:
            break
        if asked > 1:
            apart = range(most, min(asked, _APART))
            ways += [
                lambda number, one=one, rest=rest: (number == one) != rest for one in apart for rest in (False, True)
            ]
            most = max(most, min(asked, _APART))
    if not found:
        raise CupError(does_not_take(twin, sample, refused)) from refused
    if any(other != found[0] for other in found[1:]):
        raise CupError(f"what {type(twin).__name__} costs depends on the entries of a tensor, which has none here")
    return found[0]


class _Answers(TorchDispatchMode):
    """Answers code that asks a tensor without entries for a yes or no, by the number of the question."""

    def __init__(self, answer: Callable[[int], bool]) -> None:
        super().__init__()
        self.answer, self.asked = answer, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten._local_scalar_dense.default or args[0].dtype != torch.bool:
            return func(*args, **(kwargs or {}))
        self.asked += 1
        if self.asked > _MOST_QUESTIONS:
            raise CupError(f"the code asks about a tensor's entries more than {_MOST_QUESTIONS} times, maybe in a loop")
        return self.answer(self.asked - 1)


_MOST_QUESTIONS = 1000
_APART = 8
"""Questions that are also answered unlike the others."""


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_RELUS, _POOLS = (nn.ReLU, nn.ReLU6), (nn.MaxPool2d, nn.AvgPool2d)
_LINEAR = (nn.Linear, nn.MultiheadAttention)
_COUNTED = (*CONVS, nn.Linear, CutAttention, *_BATCH_NORMS, *_RELUS, *_POOLS)


def _projections(module: CutAttention, sequences: Sequence[torch.Tensor]) -> tuple[int, int]:
    """(flops, macs) of its own weights, from query, key and value; its output layer is a module, too."""
    made = sum(sequence.numel() // sequence.shape[-1] for sequence in sequences) * len(module.in_proj_weight) // 3
    macs = made * module.in_proj_weight.shape[1]
    return 2 * macs + (made if bias_of(module) is not None else 0), macs


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
    if isinstance(module, _LINEAR):
        macs = elements * value[-1]
        return 2 * macs + (elements if bias_of(module) is not None else 0), macs
    if isinstance(module, _BATCH_NORMS):
        return 2 * math.prod(value), 0
    if isinstance(module, _RELUS):
        return math.prod(value), 0
    if isinstance(module, _POOLS):
        return elements * _window(module, value[-2:]), 0
    return 0, 0


def _window(pool: nn.MaxPool2d | nn.AvgPool2d, sides: tuple[int, ...]) -> int:
    """Elements of a window; one that is larger than the padded map, as ceil_mode allows, is the whole of it."""
    kernel, padding = (_of_two_sides(value) for value in (pool.kernel_size, pool.padding))
    return math.prod(min(k, side + 2 * p) for k, side, p in zip(kernel, sides, padding, strict=True))


def _of_two_sides(value: int | tuple[int, ...]) -> tuple[int, ...]:
    """A pool's setting: one number, which torch also takes as a sequence of one, or a number a side."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * 2 if len(numbers) == 1 else numbers


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
