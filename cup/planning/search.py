"""The search for the plan that lands on a target FLOPs reduction."""

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cup.complexity import FlopsByWidths
from cup.criteria import View
from cup.plan import PrunePlan
from cup.planning.cuts import ChooseWidth, GroupCut, cut_view, plan_from, require_prunable
from cup.planning.options import PlanOptions, round_up

REDUCTION_TOLERANCE = 0.01
"""Relative tolerance around a target FLOPs reduction."""

MAX_PAIRED_GROUPS = 24
"""Networks of up to so many groups are small enough to try all pairs of steps."""


def search_reduction(view: View, target: float, options: PlanOptions, dense_flops: int | None) -> PrunePlan:
    """`plan_by_reduction` for arguments that are known to be good."""
    search = _Search(view, target, options, dense_flops)
    shallow, deep = search.bracket()
    if shallow.reduction > target * (1 + REDUCTION_TOLERANCE):
        return replace(shallow.plan, note=f"FR is {shallow.reduction:.3f} already, above {target:g}")
    if deep.reduction < target * (1 - REDUCTION_TOLERANCE):
        return replace(deep.plan, note=f"FR {target:g} is out of reach: the deepest cut gives {deep.reduction:.3f}")
    return deep.plan if search.is_near(deep.reduction) else search.between(shallow, deep)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A plan, the cuts that it comes from, and the FLOPs reduction that it leads to."""

    plan: PrunePlan
    cuts: list[GroupCut]
    reduction: float

    @property
    def top(self) -> float:
        """The largest height in its rankings, at least 1: a cut there makes all groups as narrow as they may get."""
        return max(cut.ranking.heights.max(initial=1.0) for cut in self.cuts)


class _Search:
    """Looks for the plan that lands on a target reduction; weights and the network's skeleton are read once."""

    def __init__(self, view: View, target: float, options: PlanOptions, dense_flops: int | None) -> None:
        self.view, self.target, self.options = view, target, options
        self.allowed = {group.name: options.allowed_widths(group) for group in require_prunable(view.groups, options)}
        self.flops = FlopsByWidths(view.model, view.groups, view.now)
        self.dense_flops = view.now.flops if dense_flops is None else dense_flops

    def is_near(self, reduction: float) -> bool:
        """At the target or above it by no more than the tolerance."""
        return self.target <= reduction <= self.target * (1 + REDUCTION_TOLERANCE)

    def bracket(self) -> tuple[_Candidate, _Candidate]:
        """Two cuts around the target, shallow below it and deep at or above it, near it or one step apart.

        The rankings of one trial, cut at other heights, tell about where the next trial should be. deep is below
        the target only if the smallest allowed widths are.
        """
        low, shallow = 0.0, self._at_height(0.0)
        high = 2 * shallow.top
        last, deep = shallow, self._at_height(high)
        while deep.reduction < self.target:
            if deep.top <= high:
                return shallow, deep
            high = 2 * deep.top  # a criterion may put higher what is ranked after deeper cuts
            deep = self._at_height(high)
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
        """The height between low and high at which these rankings would land within the tolerance, if they stayed."""
        inside = self.target * (1 + REDUCTION_TOLERANCE / 2)
        first, last = low, high
        for _ in range(20):
            middle = (first + last) / 2
            free = {cut.group.name: cut.ranking.width_at(middle) for cut in cuts}
            widths = {name: round_up(width, self.allowed[name]) for name, width in free.items()}
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
        if len(self.allowed) <= MAX_PAIRED_GROUPS:
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
        found = self._candidate(lambda group, ranking: widths[group.name], t)
        if abs(found.reduction - self.target) <= self.target * REDUCTION_TOLERANCE:
            return found.plan
        return replace(found.plan, note=f"FR {found.reduction:.3f} is the nearest to {self.target:g} that was found")

    def _reduction(self, widths: Mapping[str, int]) -> float:
        """FR at these widths, whichever channels they are."""
        return self.dense_flops / self.flops.after({name: range(width) for name, width in widths.items()})

    def _at_height(self, t: float) -> _Candidate:
        return self._candidate(lambda group, ranking: ranking.width_at(t), t)

    def _candidate(self, width: ChooseWidth, t: float | None) -> _Candidate:
        cuts = cut_view(self.view, width, self.options)
        plan = plan_from(cuts, t)
        return _Candidate(plan, cuts, self.dense_flops / self.flops.after(plan.kept))
