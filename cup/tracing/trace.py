"""Find the channel groups of a network: trace it, walk the graph, and check what comes of it on narrower copies."""

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from cup.tracing.groups import AxisName, ChannelGroup
from cup.tracing.meta import Sample, check_model, find_input_shape, hooked_modules, meta_copy, sample_of
from cup.tracing.tracer import Trace, trace_forward
from cup.tracing.walk import groups_of


def channel_groups(model: nn.Module, example_input: Any = None, *, allow_hooks: bool = False) -> list[ChannelGroup]:
    """Trace `model` and return its channel groups in network order, frozen ones included.

    example_input: tensor (N, ...) of the shape that the network takes, or several inputs: a tuple of its arguments, or
        a dict of them by name. Only shapes matter. Without one, common shapes are tried on the meta device. The model
        is neither run nor changed.
    allow_hooks: what a forward hook does to a module's values is not seen, so they freeze the channels around them;
        True says that all of them only look.
    Raises CupError where torch.fx cannot trace the network, the input does not fit, or the model is a wrapper.
    """
    check_model(model)
    twin = meta_copy(model)
    sample = find_input_shape(model) if example_input is None else sample_of(example_input)
    hooked = () if allow_hooks else hooked_modules(model)
    twin.train()  # first, so that auxiliary heads are part of the graph
    traces = {"training": _trace(twin, sample, hooked)}
    groups = groups_of(traces["training"], sample)
    evaluation = _trace(twin.eval(), sample, hooked)
    if evaluation.steps() != traces["training"].steps():
        groups = _allowed_in_both(groups, groups_of(evaluation, sample))
    return groups


def _trace(twin: nn.Module, sample: Sample, hooked: Collection[str]) -> Trace:
    return trace_forward(copy.deepcopy(twin), sample, hooked)


def _allowed_in_both(groups: list[ChannelGroup], evaluated: list[ChannelGroup]) -> list[ChannelGroup]:
    """The groups of training, frozen also where evaluation freezes them or wires their layers otherwise."""
    frozen = {group.name: group.frozen for group in evaluated}
    owners: dict[tuple[str, AxisName], set[str]] = {}
    for group in evaluated:
        for place in group.places:
            owners.setdefault((place.module, place.axis), set()).add(group.name)
    both = []
    for group in groups:
        used = {(place.module, place.axis) for place in group.places}
        lost = [key for key in used if key in owners and group.name not in owners[key]]
        gained = [key for key, names in owners.items() if group.name in names and key not in used]
        reason = group.frozen or frozen.pop(group.name, "")
        if not reason and (lost or gained):
            reason = f"{(lost + gained)[0][0]} is wired otherwise in evaluation"
        both.append(replace(group, frozen=reason))
        frozen.pop(group.name, None)
    only = [group for group in evaluated if group.name in frozen]
    return both + [replace(group, frozen="it is used in evaluation only") for group in only]
