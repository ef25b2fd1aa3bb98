"""Plans that stop at a target."""

import cup
from cup import PlanOptions, PrunePlan, View


def plan_to_reduction(view: View, reduction: float, options: PlanOptions) -> PrunePlan:
    """The cut that lands on an FR of the full network."""
    return cup.plan_by_reduction(view.model, view.groups, reduction, options, dense_flops=view.dense.flops)


def plan_to_threshold(view: View, t: float, target: float | None, options: PlanOptions) -> PrunePlan:
    """The cut at height t, or the one that lands on `target` where t would go beyond it."""
    plan = cup.plan_by_threshold(view.model, view.groups, t, options)
    if target is None:
        return plan
    reduction = view.dense.flops / cup.flops_after(view.model, view.groups, plan, view.now)
    return plan_to_reduction(view, target, options) if reduction > target * (1 + cup.REDUCTION_TOLERANCE) else plan


def has_landed(view: View, target: float | None) -> bool:
    """Whether the network is at its target; never where there is none."""
    return target is not None and cup.has_reached(view.reduction, target, cup.REDUCTION_TOLERANCE)
