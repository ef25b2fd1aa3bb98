"""Surgery: remove channels from a model in place, and map every old parameter to its new one."""

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cup.blocks import ResidualBlock, blocks_named, drop, groups_without, outermost
from cup.errors import CupError
from cup.folding import fold_merges
from cup.plan import PrunePlan
from cup.tracing.groups import ChannelGroup, check_groups, keep_masks, narrow_groups
from cup.tracing.layers import find_layer, weight_dim, weight_of
from cup.tracing.meta import check_model
from cup.tracing.narrowing import ParameterChange, narrow_layers
from cup.tracing.trace import channel_groups


@dataclass(frozen=True, eq=False)
class Resized:
    """The outcome of `apply_plan`: hand it to `carry_optimizer` and `carry_ema`.

    changes: the parameters that were replaced; all others are the same objects as before.
    gone: the parameters of dropped blocks.
    blocks: those that were dropped.
    groups: the channel groups at their new widths, as a new trace would find them.
    groups_before: the groups that the plan was applied to.
    """

    plan: PrunePlan
    changes: tuple[ParameterChange, ...]
    groups: list[ChannelGroup]
    groups_before: list[ChannelGroup]
    gone: tuple[nn.Parameter, ...] = ()
    blocks: tuple[ResidualBlock, ...] = ()


def apply_plan(model: nn.Module, plan: PrunePlan, groups: Sequence[ChannelGroup] | None = None) -> Resized:
    """Remove the channels that `plan` does not keep, in place; those that stay take up what the plan folds into them.

    Parameters are replaced by narrower ones (dtype, device, memory format, requires_grad and hooks kept, gradients
    dropped), batch-norm statistics are sliced, the layers' channel attributes follow. Blocks that the plan drops become
    `nn.Identity`; whether they can be dropped is looked up anew, which takes a few traces. Every rank calls it with the
    same plan, on the bare model: a DDP wrapper is dropped first and made anew after.
    groups: from `channel_groups(model)`; traced here if not given.
    Raises CupError, with the model left as it was, for a plan of another network, one that was applied already, and
    one that names frozen or unknown groups, or blocks that cannot be dropped; and for a model that a DDP wrapper holds.
    """
    check_model(model)
    _check_not_in_ddp(model)
    groups_before = list(channel_groups(model) if groups is None else groups)
    check_groups(model, groups_before)
    return apply_to(model, plan, groups_before, blocks_named(model, groups_before, plan.dropped))


def apply_to(
    model: nn.Module, plan: PrunePlan, groups: Sequence[ChannelGroup], blocks: Sequence[ResidualBlock]
) -> Resized:
    """`apply_plan` for groups that fit the model, and blocks that the plan drops and that can be dropped from it."""
    _check_plan(plan, groups, blocks)
    names = outermost(block.name for block in blocks)
    gone = tuple(parameter for name in names for parameter in model.get_submodule(name).parameters())
    staying = groups_without(model, groups, names)
    shrinking = [(group, plan.kept[group.name]) for group in staying if group.name in plan.removed]
    masks = keep_masks(shrinking)
    merges = fold_merges(model, plan, [group for group, _ in shrinking], masks)
    changes = narrow_layers(model, masks, merges)
    drop(model, names)
    kept = {group.name: plan.kept[group.name] for group in staying if group.name in plan.kept}
    return Resized(plan, changes, narrow_groups(staying, kept), list(groups), gone, tuple(blocks))


def shrink_to(
    model: nn.Module, widths: Mapping[str, int], example_input: Any = None, *, dropped: Iterable[str] = ()
) -> Resized:
    """Bring groups to the given widths in place, keeping their first channels: the shape to load stored weights into.

    widths: group name -> channels; groups that it does not name keep theirs. dropped: names of the residual blocks that
        become their shortcut; those of several cuts in their order.
    Raises CupError for an unknown group, a width outside 1..the width now, or a block that cannot be dropped; the model
    is left as it was.
    """
    groups = channel_groups(model, example_input)
    _check_not_in_ddp(model)
    blocks = blocks_named(model, groups, dropped)
    return apply_to(model, plan_first_channels(groups, widths, blocks), groups, blocks)


def plan_first_channels(
    groups: Sequence[ChannelGroup], widths: Mapping[str, int], dropped: Sequence[ResidualBlock] = ()
) -> PrunePlan:
    """The plan that `shrink_to` applies: every named group keeps its first channels, the others all of theirs.

    dropped: of `residual_blocks`; their groups go with them, whatever `widths` says of these.
    Raises CupError for an unknown or frozen group and for a width outside 1..the width now.
    """
    known = {group.name: group for group in groups}
    gone = {name: 0 for block in dropped for name in block.groups}
    for name, width in widths.items():
        if name not in known:
            raise CupError(f"no channel group {name!r} in this network; there are: {', '.join(known)}")
        if name in gone:
            continue
        if not 1 <= width <= known[name].width:
            raise CupError(f"width of {name}: found {width}, allowed: 1 to {known[name].width}")
        if known[name].frozen and width < known[name].width:
            raise CupError(f"{name} must keep its width: {known[name].frozen}")
    kept = {name: tuple(range(width)) for name, width in {**widths, **gone}.items()}
    return PrunePlan(kept, {name: known[name].width for name in kept}, dropped=tuple(block.name for block in dropped))


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
            weight_of(layer).index_fill_(weight_dim(layer, "out"), filters.to(weight_of(layer).device), 0)


def mask_gradients(model: nn.Module, filters: Mapping[str, torch.Tensor]) -> None:
    """Set the gradients of these filters to zero, in place, so that plain SGD leaves filters at zero where they are.

    filters: from `filters_that_go`, best on the model's device. Layers without a gradient are passed over.
    """
    for name, indices in filters.items():
        layer = find_layer(model, name)
        gradient = weight_of(layer).grad
        if gradient is not None:
            gradient.index_fill_(weight_dim(layer, "out"), indices.to(gradient.device), 0)


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


def _check_not_in_ddp(model: nn.Module) -> None:
    """DDP's hooks would stay on the parameters that go, and the ranks train on, each for itself."""
    if not _is_in_ddp(model):
        return
    gc.collect()  # it may be garbage that waits
    if _is_in_ddp(model):
        raise CupError(f"DDP holds this {type(model).__name__}: drop the wrapper, apply the plan, wrap the model again")


def _is_in_ddp(model: nn.Module) -> bool:
    """By the class's home, for nothing here imports it: the wrapper knows the model, but not the model its wrapper."""
    if not any(type(holder) is dict and holder.get("module") is model for holder in gc.get_referrers(model)):
        return False  # no wrapper of any kind: looking at the type of every object takes much longer
    return any(
        type(thing).__module__ == "torch.nn.parallel.distributed" and getattr(thing, "module", None) is model
        for thing in gc.get_objects()
    )


def _check_plan(plan: PrunePlan, groups: Sequence[ChannelGroup], blocks: Sequence[ResidualBlock] = ()) -> None:
    known = {group.name: group for group in groups}
    gone = {name for block in blocks for name in block.groups}
    if missing := sorted(name for name in gone if plan.kept.get(name, (0,)) != ()):
        raise CupError(f"{missing[0]} goes with its block, but the plan keeps channels of it; allowed: none")
    for name, channels in plan.kept.items():
        if name not in known:
            raise CupError(f"this plan is another network's: no channel group {name!r}; there are: {', '.join(known)}")
        group = known[name]
        if group.width != plan.widths[name]:
            raise CupError(
                f"this plan expects {name} at {plan.widths[name]} channels, found {group.width}: "
                "it was applied already, or it is another network's"
            )
        if name in gone:
            continue
        if group.frozen and len(channels) < group.width:
            raise CupError(f"{name} must keep its width: {group.frozen}")
        in_range = channels and channels[0] >= 0 and channels[-1] < group.width
        if not in_range or list(channels) != sorted(set(channels)):
            raise CupError(
                f"{name} keeps {channels}; allowed: sorted channels out of 0..{group.width - 1}, at least one"
            )
    for name, into in plan.folded.items():
        kept = plan.kept.get(name, ())
        if len(into) != plan.widths.get(name) or set(into) != set(kept) or any(into[own] != own for own in kept):
            raise CupError(f"{name} folds {into}; allowed: for each of its channels a kept one, which stays itself")
