"""The planner that saves time: the removals, over all groups, that lose least for each second saved."""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from cup.cost.model import Cost, Walk
from cup.criteria import View
from cup.errors import CupError
from cup.plan import PrunePlan
from cup.planning.cuts import cut_view, plan_from
from cup.planning.losses import losses_by_width
from cup.planning.options import PlanOptions
from cup.tracing.groups import ChannelGroup, check_groups

TIME_TOLERANCE = 0.01
"""Relative tolerance around a target speed-up."""

TIME_OPTIONS = PlanOptions(scope="all")
"""Residual streams hold most of the memory traffic, so the paper's inner groups alone save little of a GPU's time."""


def plan_by_time(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    target: float,
    options: PlanOptions = TIME_OPTIONS,
    *,
    cost: Cost,
    full_cost: float | None = None,
) -> PrunePlan:
    """The plan after which a step takes 1/target of the time, or less by up to 1% where widths allow that.

    Where the narrowest widths take up to 1% more, they are taken as reaching it.

    Group by group the next narrower width that pays is priced: what is lost (cup/planning/losses.py) for each second
    that is saved. The cheapest step is taken until the target is reached; then what turns out too much is given back.
    Which channels go is the criterion's choice, group after group as in the other planners.

    cost: what is to be saved, e.g. `device_cost("h100-sxm", batch_size=256)`. Without `options.round_to` widths are
    multiples of its granularity. full_cost: what the target is measured against; the cost now, if not given.
    If even the narrowest widths take longer than that, or none are found near, the plan's `note` says so.
    Raises CupError for a target <= 1, weights that are not finite, or groups of another network.
    """
    if not isinstance(target, int | float) or not target > 1:
        raise CupError(f"target speed-up: found {target}, allowed: a number above 1")
    check_groups(model, groups)
    view = View(model, groups)
    search = _Search(view, cost, options)
    full = search.walk.cost if full_cost is None else full_cost
    note = search.reach(full, target)
    return replace(plan_from(cut_view(view, lambda group, ranking: search.walk.widths[group.name], options)), note=note)


class _Search:
    """Widths on their way to a target."""

    def __init__(self, view: View, cost: Cost, options: PlanOptions) -> None:
        rankings = cut_view(view, lambda group, ranking: group.width, options)
        self.losses: dict[str, np.ndarray] = {}
        self.allowed: dict[str, tuple[int, ...]] = {}
        for cut in rankings:
            self.losses[cut.group.name] = losses_by_width(view, cut.group, cut.ranking)
            self.allowed[cut.group.name] = allowed_widths(cut.group, options, cost.granularity)
        self.walk: Walk = cost.of(view.model, view.groups).walk({cut.group.name: cut.group.width for cut in rankings})

    def reach(self, full: float, target: float) -> str:
        """Move the widths to the target; returns what is to be noted, "" where they are near."""
        goal = full / target
        if self.walk.cost < goal / (1 + TIME_TOLERANCE):
            return f"the step is {full / self.walk.cost:.3f} times faster already, above {target:g}"
        before = self.walk.cost
        self._narrow(goal)
        if self.walk.cost > goal:
            if self.walk.cost <= goal * (1 + TIME_TOLERANCE):
                return ""
            found = f"the narrowest widths give {full / self.walk.cost:.3f}"
            if self.walk.cost == before:
                found = "no narrower width costs less"
            return f"a speed-up of {target:g} is out of reach: {found}"
        self._widen(goal)
        if not self._is_near(self.walk.cost, goal):
            self._exchange(goal)
        if self._is_near(self.walk.cost, goal):
            return ""
        return f"a speed-up of {full / self.walk.cost:.3f} is the nearest to {target:g} that was found"

    def _is_near(self, cost: float, goal: float) -> bool:
        return goal / (1 + TIME_TOLERANCE) <= cost <= goal

    def _narrow(self, goal: float) -> None:
        """The cheapest step, again and again, until the cost is at the goal or nothing is left that saves any."""
        prices = {name: self._price(name) for name in self.allowed}
        while self.walk.cost > goal:
            name = min(prices, key=lambda name: prices[name][0])
            price, width = prices[name]
            if price == np.inf:
                return
            self.walk.move(name, width)
            for other in self.walk.neighbours(name):
                if other in prices:
                    prices[other] = self._price(other)

    def _price(self, name: str) -> tuple[float, int]:
        """(loss for each second saved, width) of the group's next step that saves any; infinite where there is none."""
        losses, now = self.losses[name], self.walk.widths[name]
        for width in self._narrower(name):
            saved = self.walk.cost - self.walk.after(name, width)
            if saved > 1e-9 * self.walk.cost:
                return float((losses[width] - losses[now]) / saved), width
        return np.inf, now

    def _widen(self, goal: float) -> None:
        """Give back steps for as long as the goal holds, what loses most first: the last step may have gone too far."""
        start = {name: allowed[-1] for name, allowed in self.allowed.items()}
        while True:
            best, gain = None, 0.0
            for name, width in self.walk.widths.items():
                if width < start[name]:
                    wider = self._next_wider(name)
                    regained = float(self.losses[name][width] - self.losses[name][wider])
                    if regained > gain and self.walk.after(name, wider) <= goal:
                        best, gain = (name, wider), regained
            if best is None:
                return
            self.walk.move(*best)

    def _exchange(self, goal: float) -> None:
        """One group a step wider and another narrower, where that lands near the goal: the pair that loses least."""
        found: list[tuple[float, tuple[str, int], tuple[str, int]]] = []
        for up, before in list(self.walk.widths.items()):
            if before == self.allowed[up][-1]:
                continue
            wider = self._next_wider(up)
            self.walk.move(up, wider)
            for down, width in self._first_steps(up):
                if self._is_near(self.walk.after(down, width), goal):
                    lost = self.losses[up][wider] + self.losses[down][width] - self.losses[down][self.walk.widths[down]]
                    found.append((float(lost - self.losses[up][before]), (up, wider), (down, width)))
            self.walk.move(up, before)
        if found:
            _, wider_step, narrower_step = min(found)
            self.walk.move(*wider_step)
            self.walk.move(*narrower_step)

    def _first_steps(self, but: str) -> Iterator[tuple[str, int]]:
        """(group, next narrower width) of all groups but one."""
        for name in self.allowed:
            if name != but:
                yield from ((name, width) for width in itertools.islice(self._narrower(name), 1))

    def _narrower(self, name: str) -> Iterator[int]:
        """Allowed widths below the current one, from the widest on."""
        allowed = self.allowed[name]
        return reversed(allowed[: bisect_left(allowed, self.walk.widths[name])])

    def _next_wider(self, name: str) -> int:
        allowed = self.allowed[name]
        return allowed[bisect_left(allowed, self.walk.widths[name]) + 1]


def allowed_widths(group: ChannelGroup, options: PlanOptions, granularity: int) -> tuple[int, ...]:
    """The widths that a plan may give the group, ascending: those of the options, or where these allow any, those that
    pay on the device.
    """
    if options.round_to == 1:
        options = replace(options, round_to=granularity)
    return options.allowed_widths(group)
