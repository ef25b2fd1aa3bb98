"""`prune.round_to: measured`: which widths are worth having on the device at hand, found by timing layers.

Hardware works in tiles: the time of a layer over its width is a staircase, and a width in the middle of a step costs
what the step's right edge costs. So for each group the layers that carry its channels are timed, forward and backward,
at widths in multiples of 8, and those widths are allowed that no wider one matches in time. The planner rounds each
cluster count up to the next of them.

"The best time per kept channel", taken by itself, would always choose the widest: a layer's time has a constant part.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from cup import ChannelGroup, PrunePlan, apply_plan
from cup.tracing.groups import Call, alive_after
from cup.tracing.layers import find_layer
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT

AllowedWidths = dict[str, list[int]]
"""Group -> widths, ascending, as `cup.PlanOptions.round_to` takes them; what JSON and a checkpoint can hold."""

NOISE = 0.02
"""Two times that differ by less, relative, count as equal."""
MAX_WIDTHS = 8
"""Widths that are timed for each group: ResNet-50 has 16 kinds of groups and then 256 layers to time."""
MAX_IMAGES_ON_CPU = 16
"""A CPU is busy with few images; more would make the measurement take minutes and tell the same."""
MIN_SECONDS = 0.01
"""For how long one layer is timed at one width; the fastest call counts."""
MIN_ROUNDS = 5
"""How often it is timed at least: among fewer calls there may be none that nothing disturbed."""


def measured_widths(
    model: nn.Module, groups: Sequence[ChannelGroup], batch_size: int, precision: Precision, device: torch.device
) -> tuple[AllowedWidths, list[str]]:
    """The allowed widths of these groups on this device, and the groups whose times do not repeat within the noise.

    One rank calls it, the others get its result as data.

    model: its layers are copied to `device` one by one, and only read here. All other groups stay at the widths that
        they have, and are timed as they run uncompiled. batch_size: images of one rank's step.
    Random numbers are drawn from a generator of its own, so that a run that measures and one that does not train alike.
    """
    timer = _Timer(min(batch_size, MAX_IMAGES_ON_CPU) if device.type == "cpu" else batch_size, precision, device)
    table, scattered = {}, []
    for group in groups:
        times = {width: timer.seconds(model, group, width) for width in widths_to_time(group.width)}
        table[group.name] = right_edges({width: fastest for width, (fastest, _) in times.items()})
        if statistics.median(second / fastest - 1 for fastest, second in times.values()) > NOISE:
            scattered.append(group.name)
    return table, scattered


def widths_to_time(width: int) -> list[int]:
    """Multiples of 8, or of more where that would be too many, up to the width that there is, and that one."""
    step = 8 * -(-width // (8 * MAX_WIDTHS))
    return [*range(step, width, step), width]


def right_edges(seconds: Mapping[int, float], noise: float = NOISE) -> list[int]:
    """The widths that are worth having, ascending: those that no wider one of them matches in time, within the noise.

    seconds: width -> time. The widest is always one of them.
    """
    edges: list[int] = []
    for width in sorted(seconds, reverse=True):
        if not edges or seconds[width] * (1 + noise) < seconds[edges[-1]]:
            edges.append(width)
    return edges[::-1]


class _Timer:
    """Times layers one by one; equal layers with equal inputs once."""

    def __init__(self, batch_size: int, precision: Precision, device: torch.device) -> None:
        self._batch_size, self._precision, self._device = batch_size, precision, device
        self._generator = torch.Generator(device).manual_seed(0)
        self._known: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = {}

    def seconds(self, model: nn.Module, group: ChannelGroup, width: int) -> tuple[float, float]:
        """Forward and backward of the layers that carry the group, at its first `width` channels: fastest and next."""
        times = [self._seconds(layer, shape) for layer, shape in _layers_at(model, group, width)]
        return sum(fastest for fastest, _ in times), sum(second for _, second in times)

    def _seconds(self, layer: nn.Module, shape: tuple[int, ...]) -> tuple[float, float]:
        key = (repr(layer), shape)
        if key not in self._known:
            self._known[key] = self._measured(layer, shape)
        return self._known[key]

    def _measured(self, layer: nn.Module, shape: tuple[int, ...]) -> tuple[float, float]:
        layer = layer.to(self._device, memory_format=MEMORY_FORMAT).train()
        size = (self._batch_size, *shape[1:])
        with self._precision.autocast():
            images = torch.randn(size, generator=self._generator, device=self._device)
            if images.dim() == 4:
                images = images.contiguous(memory_format=MEMORY_FORMAT)
            if torch.is_autocast_enabled(self._device.type):  # what the layer before it gives
                images = images.to(torch.get_autocast_dtype(self._device.type))
            gradient = torch.ones_like(layer(images))
        images.requires_grad_()

        def step() -> None:
            with self._precision.autocast():
                output = layer(images)
            output.backward(gradient)
            images.grad = None
            layer.zero_grad(set_to_none=True)

        return two_fastest(step, self._device)


def two_fastest(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds of one call, the fastest of several and the next one; the first call is a warm-up."""
    calls = 4 if device.type == "cuda" else 1  # a GPU is timed with its queue full, as training keeps it
    work()
    elapsed: list[float] = []
    while len(elapsed) < MIN_ROUNDS or sum(elapsed) < MIN_SECONDS:
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _wait_for(device)
        elapsed.append(time.perf_counter() - start)
    fastest, second, *_ = sorted(elapsed)
    return fastest / calls, second / calls


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _layers_at(model: nn.Module, group: ChannelGroup, width: int) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Copies of the layers that carry the group, at its first `width` channels, each call with its input's shape.

    Free parameters (layer scales) are left out: they are no layer, and cost next to nothing.
    """
    stub = nn.Module()
    for place in group.places:
        _put(stub, place.module, copy.deepcopy(find_layer(model, place.module)))
    kept = tuple(range(width))
    apply_plan(stub, PrunePlan({group.name: kept}, {group.name: group.width}), [group])
    alive = alive_after([group], {group.name: kept})
    names = {place.module for place in group.places}
    for call in group.network.calls:
        if call.module in names:
            layer = stub.get_submodule(call.module)
            yield layer, _input_shape(layer, call, alive)


def _put(stub: nn.Module, name: str, layer: nn.Module | nn.Parameter) -> None:
    *owners, attribute = name.split(".")
    for owner in owners:
        if not hasattr(stub, owner):
            stub.add_module(owner, nn.Module())
        stub = getattr(stub, owner)
    setattr(stub, attribute, layer)


def _input_shape(layer: nn.Module, call: Call, alive: np.ndarray) -> tuple[int, ...]:
    """The shape of the call's input, batch 1, when only the channels in `alive` are left."""
    shape = list(call.input_shape)
    if call.reads is not None:
        shape[-1 if isinstance(layer, (nn.Linear, nn.LayerNorm)) else 1] = int(alive[call.reads].sum())
    return tuple(shape)
