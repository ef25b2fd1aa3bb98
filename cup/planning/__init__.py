"""Which channels stay: planners that turn rankings into a plan, and the schedules that say when and how hard to cut."""

from cup.planning.by_clock import CLOCK_TOLERANCE, plan_by_clock
from cup.planning.by_time import TIME_OPTIONS, TIME_TOLERANCE, plan_by_time
from cup.planning.cuts import GroupCut, cut_groups
from cup.planning.evolution import EvolutionOptions, WidthSpace, evolve
from cup.planning.options import PlanOptions, round_up
from cup.planning.planners import plan_by_counts, plan_by_reduction, plan_by_threshold
from cup.planning.schedule import has_reached, is_cut_epoch, reduction_at, threshold_at
from cup.planning.search import REDUCTION_TOLERANCE
from cup.planning.uniform import uniform_widths, uniform_widths_at

__all__ = [
    "CLOCK_TOLERANCE",
    "REDUCTION_TOLERANCE",
    "TIME_OPTIONS",
    "TIME_TOLERANCE",
    "EvolutionOptions",
    "GroupCut",
    "PlanOptions",
    "WidthSpace",
    "cut_groups",
    "evolve",
    "has_reached",
    "is_cut_epoch",
    "plan_by_clock",
    "plan_by_counts",
    "plan_by_reduction",
    "plan_by_threshold",
    "plan_by_time",
    "reduction_at",
    "round_up",
    "threshold_at",
    "uniform_widths",
    "uniform_widths_at",
]
