"""Planners: decide which channels stay, by height of the cut, by target FLOPs reduction, or by counts.

A planner never touches the model. It treats the groups in network order, one after another: a group's features are
computed from weights whose inputs the groups before it have already lost (paper, step 4).
"""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import nn

from cup.complexity import FlopsByWidths, complexity
from cup.criteria.cluster import clusters_at, cut, representatives
from cup.criteria.features import Features, FeatureVariant
from cup.errors import CupError
from cup.planning.plan import PrunePlan
from cup.tracing.groups import ChannelGroup, Masks, add_masks, check_groups
from cup.tracing.meta import meta_input

REDUCTION_TOLERANCE = 0.01
"""How far above a target FLOPs reduction a plan may land, relative."""


MOST_PAIRED_GROUPS = 24
"""Networks of up to so many groups are small enough to try all pairs of steps."""


@dataclass(frozen=True)
class PlanOptions:
    """How the planners cluster; every planner takes these fields as keyword arguments."""

    features: FeatureVariant = "both"
    """Connections that describe a filter: incoming, outgoing or both."""
    use_bias: bool = True
    """Count a layer's bias among its filters' features, where it has one."""
    scope: Literal["inner", "all"] = "inner"
    """inner = groups that no residual addition touches (the paper's); all = residual groups too."""
    sequential: bool = True
    """Compute a group's features after the cuts before it (the reference); False = all from the weights as they are."""
    round_to: int | Mapping[str, Sequence[int]] = 1
    """Widths are rounded up, cutting the same dendrogram: to a multiple of this number, or to the next of a group's
    allowed widths (group -> ascending widths; a group that is not named may get any). The old width is always allowed,
    and none above it."""
    min_channels: int = 1
    """No group gets narrower than this."""

    def __post_init__(self) -> None:
        checks = [
            ("features", self.features in get_args(FeatureVariant), "both, incoming or outgoing"),
            ("scope", self.scope in ("inner", "all"), "inner or all"),
            ("round_to", _can_round_to(self.round_to), "a whole number from 1, or ascending ones for each group"),
            ("min_channels", isinstance(self.min_channels, int) and self.min_channels >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise CupError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")

    def allowed_widths(self, group: ChannelGroup) -> tuple[int, ...]:
        """The widths that a plan may give the group, ascending; the last one is the width it has."""
        widths: Iterable[int]
        if isinstance(self.round_to, int):
            widths = range(self.round_to, group.width, self.round_to)
        else:
            widths = self.round_to.get(group.name, range(1, group.width))
        return (*(width for width in widths if self.min_channels <= width < group.width), group.width)


def round_up(clusters: int, allowed: Sequence[int]) -> int:
    """The smallest of a group's allowed widths that has room for so many clusters; the widest where none has."""
    return allowed[min(bisect_left(allowed, clusters), len(allowed) - 1)]


def _can_round_to(found: Any) -> bool:
    if not isinstance(found, Mapping):
        return isinstance(found, int) and found >= 1
    return all(
        all(isinstance(width, int) and width >= 1 for width in widths)
        and all(one < other for one, other in itertools.pairwise(widths))
        for widths in found.values()
    )


@dataclass(frozen=True, eq=False)
class GroupCut:
    """How one group was cut: `labels_C[channel]` is its cluster, `kept` the representatives, `tree` SciPy's linkage."""

    group: ChannelGroup
    tree: np.ndarray
    labels_C: np.ndarray
    kept: tuple[int, ...]


def plan_by_threshold(model: nn.Module, groups: Sequence[ChannelGroup], t: float, **options: Any) -> PrunePlan:
    """Cut every group's dendrogram at height t (paper, step 2).

    groups: from `channel_groups(model)`. options: the fields of `PlanOptions`.
    Raises CupError for t <= 0, weights that are not finite, or groups of another network.
    """
    if not isinstance(t, int | float) or not t > 0:
        raise CupError(f"threshold t: found {t}, allowed: a number above 0")
    cuts = cut_groups(model, groups, lambda group, tree: clusters_at(tree, t), PlanOptions(**options))
    return _plan(cuts, threshold=t)


def plan_by_counts(
    model: nn.Module, groups: Sequence[ChannelGroup], counts: Mapping[str, int], **options: Any
) -> PrunePlan:
    """Cut each named group to exactly counts[name] clusters (paper, manual mode); the others keep their width.

    Raises CupError for an unknown or frozen group and for a count outside 1..width.
    """
    settings = PlanOptions(**options)
    known = {group.name: group for group in prunable_groups(groups, settings.scope)}
    for name, count in counts.items():
        if name not in known:
            raise CupError(f"no group {name!r} that may be pruned; there are: {', '.join(known)}")
        if not isinstance(count, int) or not 1 <= count <= known[name].width:
            raise CupError(f"counts[{name!r}]: found {count}, allowed: 1 to {known[name].width}")
    return _plan(cut_groups(model, groups, lambda group, tree: counts.get(group.name, group.width), settings))


def plan_by_reduction(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    target: float,
    *,
    dense_flops: int | None = None,
    **options: Any,
) -> PrunePlan:
    """The cut whose FLOPs reduction lands within 1% of `target`: above it where it can, or as near as there is.

    Bisection on the height t; where a small step of t jumps over the target, the first groups in network order take
    the deeper of the two neighbouring cuts and the rest the shallower one, and if need be single channels come back or
    go. If even the deepest cut stays short, or no widths are found near, `note` says so.
    dense_flops: FLOPs (the paper's counting) that the reduction is measured against; the model's own if not given.
    Raises CupError for a target <= 1.
    """
    if not isinstance(target, int | float) or not target > 1:
        raise CupError(f"target reduction: found {target}, allowed: a number above 1")
    check_groups(model, groups)
    search = _Search(model, groups, PlanOptions(**options), target, dense_flops)
    shallow, deep = search.bracket()
    if shallow.reduction > target * (1 + REDUCTION_TOLERANCE):
        return replace(shallow.plan, note=f"FR is {shallow.reduction:.3f} already, above {target:g}")
    if deep.reduction < target * (1 - REDUCTION_TOLERANCE):
        return replace(deep.plan, note=f"FR {target:g} is out of reach: the deepest cut gives {deep.reduction:.3f}")
    return deep.plan if search.is_near(deep.reduction) else search.between(shallow, deep)


def prunable_groups(groups: Iterable[ChannelGroup], scope: str = "inner") -> list[ChannelGroup]:
    """The groups that a planner with this scope cuts, in network order."""
    return [group for group in groups if not group.frozen and (group.inner or scope == "all")]


def cut_groups(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    clusters: Callable[[ChannelGroup, np.ndarray], int],
    options: PlanOptions,
    features: Features | None = None,
) -> list[GroupCut]:
    """Cluster every group in scope, in network order; `clusters(group, tree)` says into how many.

    The shared core of the planners; the model is only read. features: of the groups in scope, read here if not given.
    Raises CupError for weights that are not finite or groups that do not fit the model.
    """
    check_groups(model, groups)
    shrinkable = _some_prunable(groups, options.scope)
    if unknown := _unknown_names(options, groups):
        raise CupError(f"round_to: no channel group {unknown[0]!r}; there are: {', '.join(g.name for g in groups)}")
    if features is None:
        features = Features(model, shrinkable, options.features, options.use_bias)
    masks: Masks = {}
    cuts: list[GroupCut] = []
    for group in shrinkable:
        found = features.dendrogram(group, masks)
        labels_C = cut(found.tree, round_up(clusters(group, found.tree), options.allowed_widths(group)))
        cuts.append(GroupCut(group, found.tree, labels_C, representatives(found.squares_C, labels_C)))
        if options.sequential:
            add_masks(masks, group, cuts[-1].kept)
    return cuts


def _unknown_names(options: PlanOptions, groups: Iterable[ChannelGroup]) -> list[str]:
    """What round_to names that is no group."""
    named = options.round_to if isinstance(options.round_to, Mapping) else {}
    return sorted(set(named) - {group.name for group in groups})


def _some_prunable(groups: Iterable[ChannelGroup], scope: str) -> list[ChannelGroup]:
    shrinkable = prunable_groups(groups, scope)
    if not shrinkable:
        raise CupError(f"no group may be pruned with scope {scope!r}; cup.describe(model) says why")
    return shrinkable


def _plan(cuts: Sequence[GroupCut], threshold: float | None = None) -> PrunePlan:
    kept = {done.group.name: done.kept for done in cuts}
    return PrunePlan(kept, {done.group.name: done.group.width for done in cuts}, threshold)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A plan, the cuts that it comes from, and the FLOPs reduction that it leads to."""

    plan: PrunePlan
    cuts: list[GroupCut]
    reduction: float


class _Search:
    """Looks for the plan that lands on a target reduction; weights and the network's skeleton are read once."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        options: PlanOptions,
        target: float,
        dense_flops: int | None,
    ) -> None:
        self.model, self.groups, self.options, self.target = model, groups, options, target
        self.shrinkable = _some_prunable(groups, options.scope)
        self.allowed = {group.name: options.allowed_widths(group) for group in self.shrinkable}
        self.features = Features(model, self.shrinkable, options.features, options.use_bias)
        now = complexity(model, meta_input(groups[0].network.input_shape, batch=1))
        self.flops = FlopsByWidths(model, groups, now)
        self.dense_flops = now.flops if dense_flops is None else dense_flops

    def is_near(self, reduction: float) -> bool:
        """At the target or above it by no more than the tolerance."""
        return self.target <= reduction <= self.target * (1 + REDUCTION_TOLERANCE)

    def bracket(self) -> tuple[_Candidate, _Candidate]:
        """Two cuts around the target, shallow below it and deep at or above it, near it or one step apart.

        The trees of one trial, cut at other heights, tell about where the next trial should be. deep falls short of
        the target only where the smallest widths there are do.
        """
        low, shallow = 0.0, self._at_height(0.0)
        high = 2 * max(done.tree[:, 2].max(initial=1.0) for done in shallow.cuts)
        last, deep = shallow, self._at_height(high)
        if deep.reduction < self.target:
            return shallow, deep
        for trial in itertools.count(1):
            if self.is_near(deep.reduction) or high - low <= 1e-6 * high or self._steps(shallow, deep) <= 1:
                return shallow, deep
            halve = trial % 3 == 0  # so that the bracket closes even where the guesses creep up on the target
            t = (low + high) / 2 if halve else self._guess(last.cuts, low, high)
            last = self._at_height(t)
            if last.reduction < self.target:
                low, shallow = t, last
            else:
                high, deep = t, last

    def _guess(self, cuts: Sequence[GroupCut], low: float, high: float) -> float:
        """The height between low and high at which these trees, as they are, would land inside the tolerance."""
        inside = self.target * (1 + REDUCTION_TOLERANCE / 2)
        first, last = low, high
        for _ in range(20):
            middle = (first + last) / 2
            clusters = {done.group.name: clusters_at(done.tree, middle) for done in cuts}
            widths = {name: round_up(count, self.allowed[name]) for name, count in clusters.items()}
            first, last = (middle, last) if self._reduction(widths) < inside else (first, middle)
        margin = 0.01 * (high - low)  # the ends are known already
        return min(max((first + last) / 2, low + margin), high - margin)

    def between(self, shallow: _Candidate, deep: _Candidate) -> PrunePlan:
        """Walk from the shallow cut's widths to the deep one's, one group a step, and on from where that comes near.

        Where one channel of a group is more than the tolerance, single channels of other groups are given back or
        taken. If nothing lands, the nearest widths that were found are taken, with a note.
        """
        passed = [shallow.plan.new_widths]
        for name, goal in deep.plan.new_widths.items():
            while passed[-1][name] > goal and self._reduction(passed[-1]) < self.target:
                passed.append(self._moved(passed[-1], {name: -1}))
        nearest = min(passed, key=self._miss)
        if self._miss(nearest) > 0:
            nearest = self._settled(nearest)
        return self._with_widths(nearest, shallow.plan.threshold)

    def _settled(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Move one group, or two, by one step at a time for as long as that comes nearer to the target."""
        steps = [{name: sign} for name in self.allowed for sign in (1, -1)]
        if len(self.allowed) <= MOST_PAIRED_GROUPS:
            pairs = itertools.combinations(self.allowed, 2)
            steps += [{one: a, other: b} for one, other in pairs for a in (1, -1) for b in (1, -1)]
        best = dict(widths)
        while self._miss(best) > 0:
            found = min((self._moved(best, step) for step in steps), key=self._miss)
            if self._miss(found) >= self._miss(best):
                return best
            best = found
        return best

    def _miss(self, widths: Mapping[str, int]) -> float:
        """How far the FR of these widths is from the target; 0 where it is near enough."""
        reduction = self._reduction(widths)
        return 0.0 if self.is_near(reduction) else abs(reduction - self.target)

    def _moved(self, widths: Mapping[str, int], steps: Mapping[str, int]) -> dict[str, int]:
        """The widths with so many allowed steps more or less in the named groups, as far as there is room."""
        moved = dict(widths)
        for name, step in steps.items():
            allowed = self.allowed[name]
            moved[name] = allowed[min(max(bisect_left(allowed, widths[name]) + step, 0), len(allowed) - 1)]
        return moved

    def _steps(self, one: _Candidate, other: _Candidate) -> int:
        """Steps between allowed widths that lie between two plans, all groups together."""
        widths, others = one.plan.new_widths, other.plan.new_widths
        return sum(
            abs(bisect_left(allowed, widths[name]) - bisect_left(allowed, others[name]))
            for name, allowed in self.allowed.items()
        )

    def _with_widths(self, widths: Mapping[str, int], t: float | None) -> PrunePlan:
        found = self._candidate(lambda group, tree: widths[group.name], t)
        if abs(found.reduction - self.target) <= self.target * REDUCTION_TOLERANCE:
            return found.plan
        return replace(found.plan, note=f"FR {found.reduction:.3f} is the nearest to {self.target:g} that was found")

    def _reduction(self, widths: Mapping[str, int]) -> float:
        """FR at these widths, whichever channels they are."""
        return self.dense_flops / self.flops.after({name: range(width) for name, width in widths.items()})

    def _at_height(self, t: float) -> _Candidate:
        return self._candidate(lambda group, tree: clusters_at(tree, t), t)

    def _candidate(self, clusters: Callable[[ChannelGroup, np.ndarray], int], t: float | None) -> _Candidate:
        cuts = cut_groups(self.model, self.groups, clusters, self.options, self.features)
        plan = _plan(cuts, t)
        return _Candidate(plan, cuts, self.dense_flops / self.flops.after(plan.kept))
