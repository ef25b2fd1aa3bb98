"""Check channel groups on narrower copies: the network's code must do the same there, with the same numbers.

A width can get into a computation without the graph that the walk sees: `y / conv.out_channels ** 0.5`, a branch on an
attribute, a table as long as the channels. Traced again at other widths, such code shows: a number in the graph is
another one, the graph is another one, or the network does not run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from cup.tracing.groups import ChannelGroup, Masks, keep_masks

Retrace = Callable[[Masks], str]
"""What is wrong with the network's code on a copy that has only these channels left; "" where nothing is."""

Kept = Mapping[str, Sequence[int]]


def freeze_what_breaks(groups: Sequence[ChannelGroup], retrace: Retrace) -> list[ChannelGroup]:
    """The groups, frozen where the network's code does not do at other widths what it does at this one."""
    groups = list(groups)
    for kept in _cuts(groups):
        wrong = _culprits([group for group in groups if group.name in kept and not group.frozen], kept, retrace)
        groups = [replace(group, frozen=group.frozen or wrong.get(group.name, "")) for group in groups]
    return groups


def _cuts(groups: Sequence[ChannelGroup]) -> list[Kept]:
    """Two cuts of all that may shrink: to widths that differ between groups, and of half of them to one channel."""
    free = [group for group in groups if not group.frozen and group.width > 1]
    rng = np.random.default_rng(0)
    widths = [int(rng.integers(1, group.width)) for group in free]
    some = {group.name: range(width) for group, width in zip(free, widths, strict=True)}
    return [some, {group.name: (0,) for group in free if rng.random() < 0.5}]


def _culprits(groups: Sequence[ChannelGroup], kept: Kept, retrace: Retrace) -> dict[str, str]:
    """Group -> reason, for those that must stay so that the others may go: halved until each is found."""
    reason = retrace(keep_masks((group, kept[group.name]) for group in groups)) if groups else ""
    if not reason:
        return {}
    if len(groups) == 1:
        return {groups[0].name: reason}
    middle = len(groups) // 2
    found = {**_culprits(groups[:middle], kept, retrace), **_culprits(groups[middle:], kept, retrace)}
    if found:
        rest = [group for group in groups if group.name not in found]
        return {**found, **_culprits(rest, kept, retrace)}
    return {group.name: reason for group in groups}  # each may go alone, but not together
