"""Surgery: remove channels from a model in place, and say what became of every parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cup.errors import CupError
from cup.groups import ChannelGroup, check_groups, keep_masks, narrow_groups
from cup.layers import AxisName, find_layer, set_widths, weight_dim
from cup.plan import PrunePlan
from cup.trace import channel_groups


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
    changes: list[ParameterChange] = []
    indices: dict[str, dict[AxisName, torch.Tensor]] = {}
    for (module, axis), mask in keep_masks(shrinking).items():
        indices.setdefault(module, {})[axis] = torch.from_numpy(mask.nonzero()[0])
    for name, axes in indices.items():
        changes.extend(_narrow_layer(model, name, axes))
    return Resized(plan, tuple(changes), narrow_groups(groups_before, dict(plan.kept)), groups_before)


def shrink_to(model: nn.Module, widths: Mapping[str, int], example_input: torch.Tensor | None = None) -> Resized:
    """Bring groups to the given widths in place, keeping their first channels: the shape to load stored weights into.

    widths: group name -> channels; groups that it does not name keep theirs.
    Raises CupError for an unknown group or a width outside 1..the width now; the model is left as it was.
    """
    groups = channel_groups(model, example_input)
    known = {group.name: group.width for group in groups}
    for name, width in widths.items():
        if name not in known:
            raise CupError(f"no channel group {name!r} in {type(model).__name__}; there are: {', '.join(known)}")
        if not 1 <= width <= known[name]:
            raise CupError(f"width of {name}: found {width}, allowed: 1 to {known[name]}")
    kept = {name: tuple(range(width)) for name, width in widths.items()}
    return apply_plan(model, PrunePlan(kept, {name: known[name] for name in widths}), groups)


def select(tensor: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A new tensor with the given indices of each named dimension, in the memory format of the old one."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        narrowed = tensor.detach()
        for dim, index in axes.items():
            narrowed = narrowed.index_select(dim, index.to(tensor.device))
        return narrowed.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


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


def _narrow_layer(model: nn.Module, name: str, axes: Mapping[AxisName, torch.Tensor]) -> list[ParameterChange]:
    """Slice one layer, or free parameter, along its "out" axis, its "in" axis or both, and set its attributes."""
    layer = find_layer(model, name)
    weight_axes = {weight_dim(layer, axis): index for axis, index in axes.items()}
    if isinstance(layer, nn.Parameter):
        return [_replace(model, name, weight_axes)]
    changes = [_replace(model, f"{name}.weight", weight_axes)] if layer.weight is not None else []
    if "out" in axes:
        if getattr(layer, "bias", None) is not None:
            changes.append(_replace(model, f"{name}.bias", {0: axes["out"]}))
        for statistic in ("running_mean", "running_var"):
            if getattr(layer, statistic, None) is not None:
                setattr(layer, statistic, select(getattr(layer, statistic), {0: axes["out"]}))
    set_widths(layer, entries=len(axes["out"]) if "out" in axes else 0)
    return changes


def _replace(model: nn.Module, name: str, axes: Mapping[int, torch.Tensor]) -> ParameterChange:
    name = name.removeprefix(".")  # of a network that is one layer
    owner, _, attribute = name.rpartition(".")
    old = model.get_parameter(name)
    new = nn.Parameter(select(old, axes), requires_grad=old.requires_grad)
    # A hook on the tensor would be lost without a word with the old one.
    if old.requires_grad:
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(hook)
        for hook in (old._post_accumulate_grad_hooks or {}).values():
            new.register_post_accumulate_grad_hook(hook)
    setattr(model.get_submodule(owner), attribute, new)
    return ParameterChange(name, old, new, dict(axes))
