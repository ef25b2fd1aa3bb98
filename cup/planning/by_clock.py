"""Plans in seconds where the device is at hand: what was asked of the model is corrected by what was timed."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from cup.cost.model import Cost
from cup.errors import CupError
from cup.plan import PrunePlan
from cup.planning.by_time import TIME_OPTIONS, plan_by_time
from cup.planning.options import PlanOptions
from cup.surgery import apply_plan
from cup.tracing.groups import ChannelGroup

CLOCK_TOLERANCE = 0.03
"""Relative: by how much a timed speed-up may pass its target."""


def plan_by_clock(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    target: float,
    options: PlanOptions = TIME_OPTIONS,
    *,
    cost: Cost,
    speedup: Callable[[nn.Module], float],
    tolerance: float = CLOCK_TOLERANCE,
    rounds: int = 5,
    drop_blocks: bool = False,
) -> PrunePlan:
    """The plan after which a step takes 1/target of the time as timed, or less by up to the tolerance.

    `plan_by_time` gives a first plan. Where the clock says something else than `cost`, the model is asked for more or
    less: for what it says at the target, by a line in the logarithms between the nearest networks timed so far above
    and below it; the uncut one counts as timed once, with a speed-up of 1. After so many rounds, or where widths allow
    no plan in between, the one that came nearest is taken.

    model: only read. groups, options, drop_blocks: as of `plan_by_time`. target: against the model as it is given.
    speedup: times a network and says by how much it is faster than `model`, e.g. 1.7. It is given a copy that is cut
        and may change it. Times of both in turns, and the median of their ratios, are not bent by others' work.
    The plan's `note` says what was modelled and timed, and whether the target was missed.
    Raises CupError for a target <= 1, a tolerance <= 0 or rounds < 1, and where `speedup` returns no number above 0.
    """
    if not isinstance(target, int | float) or not target > 1:
        raise CupError(f"target speed-up: found {target}, allowed: a number above 1")
    if not tolerance > 0 or not isinstance(rounds, int) or rounds < 1:
        raise CupError(f"tolerance, rounds: found {tolerance}, {rounds}, allowed: above 0, and a whole number from 1")
    costs = cost.of(model, groups)
    aim, trials, asked = target * math.sqrt(1 + tolerance), [], target
    while True:
        plan = plan_by_time(model, groups, asked, options, cost=cost, drop_blocks=drop_blocks)
        if plan.changes_nothing:
            break
        if any(plan.digest() == trial.plan.digest() for trial in trials):
            break  # widths come in steps: none lie between
        modelled = costs.now / costs.at(plan.new_widths, plan.dropped)
        trials.append(_Trial(plan, modelled, _timed(speedup, model, groups, plan)))
        if not trials[-1].miss(target, tolerance) or len(trials) == rounds:
            break
        asked = max(_modelled_at(aim, trials), 1 + 1e-6)
    if not trials:
        return plan
    best = min(trials, key=lambda trial: trial.miss(target, tolerance))
    return replace(best.plan, note=_note(best, trials, target, tolerance))


@dataclass(frozen=True)
class _Trial:
    """A plan, and its speed-up as modelled and as timed."""

    plan: PrunePlan
    modelled: float
    timed: float

    def miss(self, target: float, tolerance: float) -> float:
        """How far it is from the band, as a logarithm; 0 inside."""
        return max(math.log(target / self.timed), math.log(self.timed / target / (1 + tolerance)), 0.0)


def _timed(
    speedup: Callable[[nn.Module], float], model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan
) -> float:
    network = copy.deepcopy(model)
    apply_plan(network, plan, list(groups))
    found = speedup(network)
    if not found > 0 or math.isinf(found):
        raise CupError(f"speedup: it returned {found}, allowed: a number above 0, the time before over the time now")
    return found


def _modelled_at(aim: float, trials: Sequence[_Trial]) -> float:
    """What the model says, so far as is known, of a network that is timed at `aim`."""
    points = [(0.0, 0.0), *((math.log(trial.modelled), math.log(trial.timed)) for trial in trials)]
    wanted = math.log(aim)
    slower = max((point for point in points if point[1] <= wanted), key=lambda point: point[1])
    faster = min((point for point in points if point[1] > wanted), key=lambda point: point[1], default=None)
    if faster is None:  # on along the line through the uncut network, but not to more than the square
        low = slower if slower[1] > 0 else points[-1]
        return math.exp(low[0] * (min(2.0, wanted / low[1]) if low[1] > 0 else 2.0))
    share = (wanted - slower[1]) / (faster[1] - slower[1])
    return math.exp(slower[0] + share * (faster[0] - slower[0]))


def _note(best: _Trial, trials: Sequence[_Trial], target: float, tolerance: float) -> str:
    """One line: what was modelled and timed, and whether it is what was asked for."""
    rounds = f"{len(trials)} round" + "s" * (len(trials) > 1)
    found = f"timed {best.timed:.3f} times faster (modelled {best.modelled:.3f}) after {rounds}"
    if not best.miss(target, tolerance):
        return found
    reason = f"; the planner: {trials[-1].plan.note}" if trials[-1].plan.note else ""
    return f"{found}, the nearest to {target:g} that was found{reason}"
