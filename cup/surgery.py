"""Surgery: remove channels from a model in place, and say what became of every parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cup.errors import CupError
from cup.plan import PrunePlan
from cup.tracing.groups import ChannelGroup, check_groups, keep_masks, narrow_groups
from cup.tracing.layers import AxisName, find_layer, set_widths, weight_dim
from cup.tracing.trace import channel_groups


@dataclass(frozen=True, eq=False)
class ParameterChange:
    """What became of one parameter: new = old with the indices of each named axis selected.

    axes: dimension -> int64 kept indices, on the parameter's device.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    axes: Mapping[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Resized:
    """The outcome of `apply_plan`: hand it to `carry_optimizer` and `carry_ema`.

    changes: the parameters that were replaced; all others are the same objects as before.
    groups: the channel groups at their new widths, as a new trace would find them.
    groups_before: the groups that the plan was applied to.
    """

    plan: PrunePlan
    changes: tuple[ParameterChange, ...]
    groups: list[ChannelGroup]
    groups_before: list[ChannelGroup]


def apply_plan(model: nn.Module, plan: PrunePlan, groups: Sequence[ChannelGroup] | None = None) -> Resized:
    """Remove the channels that `plan` does not keep, in place.

    Parameters are replaced by narrower ones (dtype, device, memory format, requires_grad and hooks kept, gradients
    dropped), batch-norm statistics are sliced, the layers' channel attributes follow. Take the model out of DDP first.
    Every rank calls it with the same plan.
    groups: from `channel_groups(model)`; traced here if not given.
    Raises CupError, with the model left as it was, for a plan of another network, one that was applied already, and
    one that names frozen or unknown groups.
    """
    groups_before = list(channel_groups(model) if groups is None else groups)
    check_groups(model, groups_before)
    _check_plan(plan, groups_before)
    shrinking = [(group, plan.kept[group.name]) for group in groups_before if group.name in plan.removed]
    indices: dict[str, dict[AxisName, torch.Tensor]] = {}
    for (module, axis), mask in keep_masks(shrinking).items():
        indices.setdefault(module, {})[axis] = torch.from_numpy(mask.nonzero()[0])
    narrowed = [
        _narrowed(model, name, axes) for name, axes in indices.items()
    ]  # all of it before any of it is installed
    for layer in narrowed:
        _install(model, layer)
    changes = tuple(change for layer in narrowed for change in layer.changes)
    return Resized(plan, changes, narrow_groups(groups_before, dict(plan.kept)), groups_before)


def shrink_to(model: nn.Module, widths: Mapping[str, int], example_input: torch.Tensor | None = None) -> Resized:
    """Bring groups to the given widths in place, keeping their first channels: the shape to load stored weights into.

    widths: group name -> channels; groups that it does not name keep theirs.
    Raises CupError for an unknown group or a width outside 1..the width now; the model is left as it was.
    """
    groups = channel_groups(model, example_input)
    return apply_plan(model, plan_first_channels(groups, widths), groups)


def plan_first_channels(groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> PrunePlan:
    """The plan that `shrink_to` applies: every named group keeps its first channels, the others all of theirs.

    Raises CupError for an unknown or frozen group and for a width outside 1..the width now.
    """
    known = {group.name: group for group in groups}
    for name, width in widths.items():
        if name not in known:
            raise CupError(f"no channel group {name!r} in this network; there are: {', '.join(known)}")
        if not 1 <= width <= known[name].width:
            raise CupError(f"width of {name}: found {width}, allowed: 1 to {known[name].width}")
        if known[name].frozen and width < known[name].width:
            raise CupError(f"{name} must keep its width: {known[name].frozen}")
    kept = {name: tuple(range(width)) for name, width in widths.items()}
    return PrunePlan(kept, {name: known[name].width for name in widths})


def zero_filters(model: nn.Module, plan: PrunePlan, groups: Sequence[ChannelGroup]) -> None:
    """Set the filters that write the channels which `plan` does not keep to zero, in place.

    All shapes stay, and so do biases and batch norm: without them a ReLU would keep the filters from growing back (SFP,
    arXiv 1808.06866, and its released code).
    groups: the model's. Raises CupError, with the model left as it was, for a plan of another network.
    """
    check_groups(model, groups)
    with torch.no_grad():
        for name, filters in filters_that_go(plan, groups).items():
            layer = find_layer(model, name)
            layer.weight.index_fill_(weight_dim(layer, "out"), filters.to(layer.weight.device), 0)


def mask_gradients(model: nn.Module, filters: Mapping[str, torch.Tensor]) -> None:
    """Set the gradients of these filters to zero, in place, so that plain SGD leaves filters at zero where they are.

    filters: from `filters_that_go`, best on the model's device. Layers without a gradient are passed over.
    """
    for name, indices in filters.items():
        layer = find_layer(model, name)
        if layer.weight.grad is not None:
            layer.weight.grad.index_fill_(weight_dim(layer, "out"), indices.to(layer.weight.device), 0)


def filters_that_go(plan: PrunePlan, groups: Sequence[ChannelGroup]) -> dict[str, torch.Tensor]:
    """Layer -> int64 indices of its filters that write the channels which `plan` does not keep.

    groups: of the network that the plan is for. Raises CupError for a plan of another one.
    """
    _check_plan(plan, groups)
    indices: dict[str, list[np.ndarray]] = {}
    for group in groups:
        if group.name in plan.removed:
            goes_C = np.ones(group.width, dtype=bool)
            goes_C[list(plan.kept[group.name])] = False
            for place in group.producers:
                goes = (place.channel_of_index >= 0) & goes_C[place.channel_of_index]
                indices.setdefault(place.module, []).append(goes.nonzero()[0])
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in indices.items()}


def select(tensor: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A new tensor with the given indices of each named dimension, in the memory format of the old one."""
    with torch.no_grad():
        narrowed = tensor.detach()
        for dim, index in axes.items():
            narrowed = narrowed.index_select(dim, index.to(tensor.device))
        # Not .contiguous(): for a 1x1 kernel any order of the strides counts as contiguous, and would get lost.
        return torch.empty_like(narrowed, memory_format=_memory_format(tensor)).copy_(narrowed)


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """The format whose strides the tensor has."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is None:
        return torch.contiguous_format
    strides = torch.empty(tensor.shape, device="meta", memory_format=channels_last).stride()
    return channels_last if tensor.stride() == strides else torch.contiguous_format


def _check_plan(plan: PrunePlan, groups: Sequence[ChannelGroup]) -> None:
    known = {group.name: group for group in groups}
    for name, channels in plan.kept.items():
        if name not in known:
            raise CupError(f"this plan is another network's: no channel group {name!r}; there are: {', '.join(known)}")
        group = known[name]
        if group.width != plan.widths[name]:
            raise CupError(
                f"this plan expects {name} at {plan.widths[name]} channels, found {group.width}: "
                "it was applied already, or it is another network's"
            )
        if group.frozen and len(channels) < group.width:
            raise CupError(f"{name} must keep its width: {group.frozen}")
        in_range = channels and channels[0] >= 0 and channels[-1] < group.width
        if not in_range or list(channels) != sorted(set(channels)):
            raise CupError(
                f"{name} keeps {channels}; allowed: sorted channels out of 0..{group.width - 1}, at least one"
            )


@dataclass(frozen=True, eq=False)
class _NarrowedLayer:
    """New tensors of one layer, or free parameter, not installed yet. entries: of its "out" axis, if that shrinks."""

    name: str
    changes: tuple[ParameterChange, ...]
    statistics: Mapping[str, torch.Tensor]
    entries: int


def _narrowed(model: nn.Module, name: str, axes: Mapping[AxisName, torch.Tensor]) -> _NarrowedLayer:
    """The layer's tensors along its "out" axis, its "in" axis or both; the layer itself stays as it is."""
    layer = find_layer(model, name)
    weight_axes = {weight_dim(layer, axis): index for axis, index in axes.items()}
    if isinstance(layer, nn.Parameter):
        return _NarrowedLayer(name, (_change(model, name, weight_axes),), {}, 0)
    changes = [_change(model, f"{name}.weight", weight_axes)] if layer.weight is not None else []
    if "out" not in axes:
        return _NarrowedLayer(name, tuple(changes), {}, 0)
    entries = {0: axes["out"]}
    if getattr(layer, "bias", None) is not None:
        changes.append(_change(model, f"{name}.bias", entries))
    statistics = {key: getattr(layer, key, None) for key in ("running_mean", "running_var")}
    statistics = {key: select(value, entries) for key, value in statistics.items() if value is not None}
    return _NarrowedLayer(name, tuple(changes), statistics, len(axes["out"]))


def _change(model: nn.Module, name: str, axes: Mapping[int, torch.Tensor]) -> ParameterChange:
    name = name.removeprefix(".")  # of a network that is one layer
    try:
        old = model.get_parameter(name)
    except AttributeError as error:
        raise CupError(
            f"{name} is computed from other parameters, by a mask or a parametrization: trace again"
        ) from error
    new = nn.Parameter(select(old, axes), requires_grad=old.requires_grad)
    vars(new).update(vars(old))  # what a user has noted on the parameter
    return ParameterChange(name, old, new, dict(axes))


def _install(model: nn.Module, narrowed: _NarrowedLayer) -> None:
    for change in narrowed.changes:
        owner, _, attribute = change.name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, change.new)
        if change.old.requires_grad:  # a hook on the tensor would be lost without a word with the old one
            for hook in (change.old._backward_hooks or {}).values():
                change.new.register_hook(hook)
            for hook in (change.old._post_accumulate_grad_hooks or {}).values():
                change.new.register_post_accumulate_grad_hook(hook)
    layer = find_layer(model, narrowed.name)
    if not isinstance(layer, nn.Parameter):
        for key, value in narrowed.statistics.items():
            setattr(layer, key, value)
        set_widths(layer, narrowed.entries)
