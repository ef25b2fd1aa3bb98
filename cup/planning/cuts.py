"""What all planners share: rank every group in network order, and keep the channels that a width leaves."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from cup.blocks import groups_without
from cup.criteria import Ranking, View
from cup.errors import CupError
from cup.plan import PrunePlan
from cup.planning.options import DEFAULT_OPTIONS, PlanOptions, round_up
from cup.tracing.groups import ChannelGroup, Masks, add_masks, check_groups, prunable_groups

ChooseWidth = Callable[[ChannelGroup, Ranking], int]
"""How many channels of a ranked group should stay, before rounding to the widths that are allowed."""


@dataclass(frozen=True, eq=False)
class GroupCut:
    """How one group is cut. kept: sorted ids of the channels that stay. folds: whether they take up the others."""

    group: ChannelGroup
    ranking: Ranking
    kept: tuple[int, ...]
    folds: bool = False


def cut_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    width: ChooseWidth,
    options: PlanOptions = DEFAULT_OPTIONS,
    dropped: Iterable[str] = (),
) -> list[GroupCut]:
    """Rank every group in scope, in network order; `width(group, ranking)` says how many of its channels stay.

    The model is only read. dropped: names of the residual blocks that the plan drops, without which it is ranked.
    Raises CupError for weights that are not finite, groups that do not fit the model, and none that may be pruned,
    but where dropped blocks have taken the last of these along: then nothing is cut.
    """
    check_groups(model, groups)
    return cut_without(View(model, groups), dropped, width, options)


def cut_without(view: View, dropped: Iterable[str], width: ChooseWidth, options: PlanOptions) -> list[GroupCut]:
    """`cut_view` as if these blocks had gone."""
    if dropped := list(dropped):
        view = View(view.model, groups_without(view.model, view.groups, dropped))
    return cut_view(view, width, options)


def cut_view(view: View, width: ChooseWidth, options: PlanOptions) -> list[GroupCut]:
    """`cut_groups` for groups that are known to fit the model; the view remembers what it read for the next call.

    Nothing where dropped blocks have taken the last group along that might be pruned.
    """
    if view.groups[0].network.dense is not None and not prunable_groups(view.groups, options.scope):
        return []
    criterion = options.ranker
    masks: Masks = {}
    cuts: list[GroupCut] = []
    for group in require_prunable(view.groups, options):
        ranking = criterion.rank(group, view, masks)
        if (ranked := len(ranking.order_C)) != group.width:
            raise CupError(f"the criterion ranks {ranked} channels of {group.name}, which has {group.width}")
        kept = ranking.kept(round_up(width(group, ranking), options.allowed_widths(group)))
        cuts.append(GroupCut(group, ranking, kept, options.fold))
        if options.sequential:
            add_masks(masks, group, kept)
    return cuts


def plan_from(cuts: Sequence[GroupCut], threshold: float | None = None) -> PrunePlan:
    """The plan that does these cuts. threshold: the height that they were all made at, if there is one."""
    widths = {cut.group.name: cut.group.width for cut in cuts}
    folding = [cut for cut in cuts if cut.folds and len(cut.kept) < cut.group.width]
    folded = {cut.group.name: cut.ranking.folded(len(cut.kept)) for cut in folding}
    return PrunePlan({cut.group.name: cut.kept for cut in cuts}, widths, threshold, folded=folded)


def require_prunable(groups: Sequence[ChannelGroup], options: PlanOptions) -> list[ChannelGroup]:
    """`prunable_groups`; CupError where there is none, or where the options name a group that is not there."""
    prunable = prunable_groups(groups, options.scope)
    if not prunable:
        raise CupError(f"no group may be pruned with scope {options.scope!r}; cup.describe(model) says why")
    named = options.round_to if isinstance(options.round_to, Mapping) else {}
    dense = groups[0].network.dense
    gone = set() if dense is None else {call.module for call in dense.calls}  # groups of dropped blocks are known, too
    if unknown := sorted(set(named) - {group.name for group in groups} - gone):
        raise CupError(f"round_to: no channel group {unknown[0]!r}; there are: {', '.join(g.name for g in groups)}")
    return prunable
