"""The widths of each epoch of a ramp to a target, as the method would cut the weights that are given.

A real run plans on weights that have been trained in the meantime; what it removes differs, its widths hardly do, for
the planners stop where FLOPs or modelled seconds are at the ramp's goal.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cup
from launch.projections.network import Network, Widths
from train.methods import PruneConfig, build_method

PLANS = 6
"""Cuts of a ramp that are planned; widths between two of them lie on a line. One plan takes about a second."""


@dataclass(frozen=True)
class Ramp:
    """For each epoch what a network looks like.

    widths: of all groups that may shrink. dropped: the residual blocks that are gone. note: what the last plan says of
    a target not reached.
    """

    widths: Sequence[Widths]
    dropped: Sequence[tuple[str, ...]]
    note: str = ""


def dense_ramp(network: Network, epochs: int) -> Ramp:
    return Ramp([network.dense_widths] * epochs, [()] * epochs)


def ramp_to_target(network: Network, prune: PruneConfig, epochs: int, cost: cup.DeviceCost) -> Ramp:
    """The straight line, in FR or in speed-up, to the target of `prune`. The network is only read.

    prune: with a target; of its ramp only epochs count, for a threshold means little on weights that are not trained.
    cost: what a target speed-up is about.
    """
    last_epoch = min(prune.last_epoch or epochs, epochs)
    cuts = [epoch for epoch in range(1, last_epoch + 1) if cup.is_cut_epoch(epoch, prune.every, last_epoch)]
    planned, gone, note = _planned(network, straight(prune), epochs, _spread(cuts, PLANS), cost)
    found: list[Widths] = []
    for epoch in range(1, epochs + 1):
        found.append(_between(planned, epoch, prune.round_to) if epoch in cuts else (found or [planned[1]])[-1])
    dropped = [gone[max(one for one in gone if one <= epoch)] for epoch in range(1, epochs + 1)]
    return Ramp(found, dropped, note)


def straight(prune: PruneConfig) -> PruneConfig:
    """The straight ramp to the same target."""
    kind = "reduction" if prune.target_speedup is None else "speedup"
    ramp = dataclasses.replace(prune.hard_ramp, kind=kind)
    return dataclasses.replace(prune, method="hard_ramp", hard_ramp=ramp)


def _planned(
    network: Network, prune: PruneConfig, epochs: int, at: Sequence[int], cost: cup.DeviceCost
) -> tuple[dict[int, Widths], dict[int, tuple[str, ...]], str]:
    """Epoch -> widths after the method's cut at its start, and epoch -> blocks that are gone; for the first epoch,
    where nothing is cut, the full network.
    """
    method, model, groups = build_method(prune, epochs), copy.deepcopy(network.model), network.groups
    found, widths, note = {1: network.dense_widths}, network.dense_widths, ""
    gone: dict[int, tuple[str, ...]] = {1: ()}
    dropped: tuple[str, ...] = ()
    for epoch in at:
        action = method.epoch_start(epoch, cup.View(model, groups, network.dense, cost=cost))
        if action is not None:
            groups, dropped = cup.apply_plan(model, action.plan, groups).groups, (*dropped, *action.plan.dropped)
            widths, note = {group.name: group.width for group in groups if not group.frozen}, action.plan.note
        found[epoch], gone[epoch] = widths, dropped
    return found, gone, note


def _spread(epochs: Sequence[int], count: int) -> list[int]:
    """So many of them and the first, as evenly as can be, with the last."""
    return sorted({epochs[round(index * (len(epochs) - 1) / count)] for index in range(count + 1)})


def _between(planned: dict[int, Widths], epoch: int, round_to: int) -> Widths:
    """The widths at this epoch, on the line between the plans around it, rounded up; of blocks that the plan after it
    drops as they are.
    """
    before = max(one for one in planned if one <= epoch)
    after = min((one for one in planned if one >= epoch), default=before)
    if before == after:
        return planned[before]
    share = (epoch - before) / (after - before)
    return {
        name: min(
            wide, math.ceil((wide + share * (planned[after].get(name, wide) - wide)) / round_to - 1e-9) * round_to
        )
        for name, wide in planned[before].items()
    }
