"""Planners: decide which channels stay, by a height for all groups, by counts, or by a target FLOPs reduction.

A planner reads the model and leaves it alone. It knows criteria by their rankings only, and treats the groups in
network order, one after another: a group is ranked by weights whose inputs the groups before it have already lost
(paper, step 4).
"""

from collections.abc import Mapping, Sequence

from torch import nn

from cup.criteria import View
from cup.errors import CupError
from cup.plan import PrunePlan
from cup.planning.cuts import cut_groups, plan_from
from cup.planning.options import DEFAULT_OPTIONS, PlanOptions
from cup.planning.search import search_reduction
from cup.tracing.groups import ChannelGroup, check_groups, prunable_groups


def plan_by_threshold(
    model: nn.Module, groups: Sequence[ChannelGroup], t: float, options: PlanOptions = DEFAULT_OPTIONS
) -> PrunePlan:
    """Remove what the criterion puts at heights up to t: for CUP, cut every dendrogram there (paper, step 2).

    groups: from `channel_groups(model)`.
    Raises CupError for t <= 0, weights that are not finite, or groups of another network.
    """
    if not isinstance(t, int | float) or not t > 0:
        raise CupError(f"threshold t: found {t}, allowed: a number above 0")
    return plan_from(cut_groups(model, groups, lambda group, ranking: ranking.width_at(t), options), threshold=t)


def plan_by_counts(
    model: nn.Module, groups: Sequence[ChannelGroup], counts: Mapping[str, int], options: PlanOptions = DEFAULT_OPTIONS
) -> PrunePlan:
    """Narrow each named group to counts[name] channels (paper, manual mode); the others keep their width.

    Raises CupError for an unknown or frozen group and for a count outside 1..width.
    """
    known = {group.name: group for group in prunable_groups(groups, options.scope)}
    for name, count in counts.items():
        if name not in known:
            raise CupError(f"no group {name!r} that may be pruned; there are: {', '.join(known)}")
        if not isinstance(count, int) or not 1 <= count <= known[name].width:
            raise CupError(f"counts[{name!r}]: found {count}, allowed: 1 to {known[name].width}")
    return plan_from(cut_groups(model, groups, lambda group, ranking: counts.get(group.name, group.width), options))


def plan_by_reduction(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    target: float,
    options: PlanOptions = DEFAULT_OPTIONS,
    *,
    dense_flops: int | None = None,
) -> PrunePlan:
    """The cut whose FLOPs reduction lands within 1% of `target`: above it where it can, or as near as there is.

    Bisects the height t. Where a small step of t jumps over the target, groups move from the shallower to the deeper
    of the two cuts one by one, in network order; then single channels are given back or taken. If even the deepest cut
    stays short, or no widths are found near, `note` says so.
    dense_flops: FLOPs (the paper's counting) that the reduction is measured against; the model's own if not given.
    Raises CupError for a target <= 1.
    """
    if not isinstance(target, int | float) or not target > 1:
        raise CupError(f"target reduction: found {target}, allowed: a number above 1")
    check_groups(model, groups)
    return search_reduction(View(model, groups), target, options, dense_flops)
