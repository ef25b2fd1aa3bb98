"""Where a method stops: at a FLOPs reduction, or at a speed-up of the step. And plans that land there."""

from dataclasses import dataclass
from typing import Protocol

import cup
from cup import PlanOptions, PrunePlan, View


class Target(Protocol):
    """A number above 1 that cuts raise. setting: its name in the configuration."""

    @property
    def value(self) -> float: ...

    @property
    def setting(self) -> str: ...

    @property
    def tolerance(self) -> float:
        """Relative."""
        ...

    def found(self, view: View) -> float:
        """What the network has now."""
        ...

    def after(self, view: View, plan: PrunePlan) -> float:
        """What it would have after the plan."""
        ...

    def plan(self, view: View, goal: float, options: PlanOptions) -> PrunePlan:
        """The cut that lands on `goal`, measured against the full network."""
        ...


@dataclass(frozen=True)
class ReductionTarget:
    """FLOPs of the full network over FLOPs now."""

    value: float

    setting = "target_reduction"
    tolerance = cup.REDUCTION_TOLERANCE

    def found(self, view: View) -> float:
        return view.reduction

    def after(self, view: View, plan: PrunePlan) -> float:
        return view.dense.flops / cup.flops_after(view.model, view.groups, plan, view.now)

    def plan(self, view: View, goal: float, options: PlanOptions) -> PrunePlan:
        return cup.plan_by_reduction(view.model, view.groups, goal, options, dense_flops=view.dense.flops)


@dataclass(frozen=True)
class SpeedupTarget:
    """Modelled seconds of the full network's step over seconds now, on the device of `view.cost`.

    drop_blocks: whether plans may drop residual blocks. Those on the way to `value` may pass their goal up to there:
        a block saves more at once than a ramp asks for in an epoch.
    """

    value: float
    drop_blocks: bool = False

    setting = "target_speedup"
    tolerance = cup.TIME_TOLERANCE

    def found(self, view: View) -> float:
        return view.speedup

    def after(self, view: View, plan: PrunePlan) -> float:
        return view.seconds.full / view.seconds.at(plan.new_widths, plan.dropped)

    def plan(self, view: View, goal: float, options: PlanOptions) -> PrunePlan:
        settings = {"full_cost": view.seconds.full, "drop_blocks": self.drop_blocks, "at_most": self.value}
        return cup.plan_by_time(view.model, view.groups, goal, options, cost=view.cost, **settings)


def plan_to_target(view: View, target: Target, options: PlanOptions) -> PrunePlan:
    """The cut that lands on the target."""
    return target.plan(view, target.value, options)


def plan_to_threshold(view: View, t: float, target: Target | None, options: PlanOptions) -> PrunePlan:
    """The cut at height t, or the one that lands on `target` where t would go beyond it."""
    plan = cup.plan_by_threshold(view.model, view.groups, t, options)
    if target is None:
        return plan
    goes_beyond = target.after(view, plan) > target.value * (1 + target.tolerance)
    return plan_to_target(view, target, options) if goes_beyond else plan


def has_landed(view: View, target: Target | None) -> bool:
    """Whether the network is at its target; never where there is none."""
    return target is not None and cup.has_reached(target.found(view), target.value, target.tolerance)
