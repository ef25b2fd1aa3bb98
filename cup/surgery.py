"""Surgery: remove channels from a model in place, and say what became of every parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cup.errors import CupError
from cup.groups import AxisName, ChannelGroup, check_groups, keep_masks, narrow_groups
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

    Parameters are replaced by narrower ones (dtype, device, memory format and requires_grad kept, gradients dropped),
    batch-norm statistics are sliced, the layers' channel attributes follow. Take the model out of DDP first. Every
    rank calls it with the same plan.
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
        changes.extend(_narrow_module(name, model.get_submodule(name), axes))
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


def _narrow_module(name: str, module: nn.Module, axes: Mapping[AxisName, torch.Tensor]) -> list[ParameterChange]:
    """Slice one layer along its "out" axis, its "in" axis or both, and set its channel attributes."""
    weight_axes = {dim: axes[axis] for dim, axis in ((0, "out"), (1, "in")) if axis in axes}
    vector_axes = {0: axes["out"]} if "out" in axes else {}
    changes = [_replace(name, module, "weight", weight_axes)] if module.weight is not None else []
    if vector_axes and module.bias is not None:
        changes.append(_replace(name, module, "bias", vector_axes))
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.running_mean is not None:
            module.running_mean = select(module.running_mean, vector_axes)
            module.running_var = select(module.running_var, vector_axes)
        module.num_features = len(axes["out"])
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif module.groups > 1:  # depthwise: one input channel for each filter bank
        per_group = module.out_channels // module.groups
        module.out_channels = len(module.weight)
        module.in_channels = module.groups = module.out_channels // per_group
    else:
        module.out_channels, module.in_channels = module.weight.shape[:2]
    return changes


def _replace(name: str, module: nn.Module, attribute: str, axes: Mapping[int, torch.Tensor]) -> ParameterChange:
    old = getattr(module, attribute)
    new = nn.Parameter(select(old, axes), requires_grad=old.requires_grad)
    setattr(module, attribute, new)
    return ParameterChange(f"{name}.{attribute}" if name else attribute, old, new, dict(axes))
