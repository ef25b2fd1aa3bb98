"""Find the channel groups of a network: trace it, walk the graph, and check what comes of it on narrower copies."""

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn

from cup.errors import CupError
from cup.tracing.groups import AxisName, ChannelGroup, Masks
from cup.tracing.meta import Sample, check_model, find_input_shape, hooked_modules, meta_copy, sample_of
from cup.tracing.narrowing import narrow_layers
from cup.tracing.retrace import freeze_what_breaks
from cup.tracing.tracer import Trace, trace_forward
from cup.tracing.walk import groups_of, title


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
    training = _trace(twin.train(), sample, hooked)  # first, so that auxiliary heads are part of the graph
    groups = groups_of(training, sample)
    groups = freeze_what_breaks(groups, lambda masks: _difference(training, twin.train(), masks, sample, hooked))
    evaluation = _trace(twin.eval(), sample, hooked)
    if evaluation.steps(like=training) == training.steps():
        return groups
    evaluated = groups_of(evaluation, sample)
    groups = _told_apart(_allowed_in_both(groups, evaluated), evaluated)
    return freeze_what_breaks(groups, lambda masks: _difference(evaluation, twin.eval(), masks, sample, hooked))


def _trace(twin: nn.Module, sample: Sample, hooked: Collection[str]) -> Trace:
    return trace_forward(copy.deepcopy(twin), sample, hooked)


def _difference(full: Trace, twin: nn.Module, masks: Masks, sample: Sample, hooked: Collection[str]) -> str:
    """What the code of a narrower copy does otherwise than that of the full network; "" for nothing."""
    narrow = copy.deepcopy(twin)
    try:
        narrow_layers(narrow, masks)
        steps = trace_forward(narrow, sample, hooked).steps(like=full)
    except CupError as error:
        return f"without some of its channels the network does not run: {error}"
    if steps == full.steps():
        return ""
    nodes = list(full.graph.nodes)
    differing = [node for node, before, now in zip(nodes, full.steps(), steps, strict=False) if before != now]
    if len(steps) == len(nodes) and all(
        before[:2] == now[:2] or before[0] == "get_attr" for before, now in zip(full.steps(), steps, strict=True)
    ):
        return f"{title(differing[0])} is given a number that depends on its width"
    return "the network's code takes another path at other widths"


def _told_apart(groups: list[ChannelGroup], evaluated: list[ChannelGroup]) -> list[ChannelGroup]:
    """The groups of training, whose operations know which of them evaluation leaves out."""
    if not groups or not evaluated:
        return groups
    run = {operation.module for operation in evaluated[0].network.operations}
    network = groups[0].network
    operations = tuple(replace(one, in_evaluation=one.module in run) for one in network.operations)
    network = replace(network, operations=operations)
    return [replace(group, network=network) for group in groups]


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
