"""CUP as a library: find filters that do the same work, keep one of each, resize the network under training.

Tensors and plain data in, plain data out: nothing here knows of ranks, logging or the clock, and only `load`, `save`
and `read_saved` touch files.
"""

from cup.blocks import ResidualBlock, residual_blocks
from cup.carry import carry_ema, carry_optimizer, check_optimizer
from cup.complexity import Complexity, FlopsByWidths, LayerCost, complexity, complexity_after, flops_after
from cup.cost import (
    DEVICES,
    KERNELS,
    Cost,
    CostByWidths,
    Device,
    DeviceCost,
    FlopsCost,
    Rate,
    StepSeconds,
    device_cost,
    named_device,
)
from cup.criteria import CRITERIA, Criterion, Ranking, View
from cup.describe import describe
from cup.errors import CupError
from cup.lasso import GroupLasso
from cup.plan import PrunePlan
from cup.planning import (
    CLOCK_TOLERANCE,
    REDUCTION_TOLERANCE,
    TIME_OPTIONS,
    TIME_TOLERANCE,
    EvolutionOptions,
    GroupCut,
    PlanOptions,
    WidthSpace,
    cut_groups,
    evolve,
    has_reached,
    is_cut_epoch,
    plan_by_clock,
    plan_by_counts,
    plan_by_reduction,
    plan_by_threshold,
    plan_by_time,
    reduction_at,
    threshold_at,
    uniform_widths,
    uniform_widths_at,
)
from cup.saved import SavedNetwork, load, read_saved, save
from cup.surgery import (
    Resized,
    apply_plan,
    filters_that_go,
    mask_gradients,
    plan_first_channels,
    shrink_to,
    zero_filters,
)
from cup.tracing.groups import ChannelGroup, Place, prunable_groups
from cup.tracing.narrowing import ParameterChange
from cup.tracing.trace import channel_groups

__all__ = [
    "CLOCK_TOLERANCE",
    "CRITERIA",
    "DEVICES",
    "KERNELS",
    "REDUCTION_TOLERANCE",
    "TIME_OPTIONS",
    "TIME_TOLERANCE",
    "ChannelGroup",
    "Complexity",
    "Cost",
    "CostByWidths",
    "Criterion",
    "CupError",
    "Device",
    "DeviceCost",
    "EvolutionOptions",
    "FlopsByWidths",
    "FlopsCost",
    "GroupCut",
    "GroupLasso",
    "LayerCost",
    "ParameterChange",
    "Place",
    "PlanOptions",
    "PrunePlan",
    "Ranking",
    "Rate",
    "ResidualBlock",
    "Resized",
    "SavedNetwork",
    "StepSeconds",
    "View",
    "WidthSpace",
    "apply_plan",
    "carry_ema",
    "carry_optimizer",
    "channel_groups",
    "check_optimizer",
    "complexity",
    "complexity_after",
    "cut_groups",
    "describe",
    "device_cost",
    "evolve",
    "filters_that_go",
    "flops_after",
    "has_reached",
    "is_cut_epoch",
    "load",
    "mask_gradients",
    "named_device",
    "plan_by_clock",
    "plan_by_counts",
    "plan_by_reduction",
    "plan_by_threshold",
    "plan_by_time",
    "plan_first_channels",
    "prunable_groups",
    "read_saved",
    "reduction_at",
    "residual_blocks",
    "save",
    "shrink_to",
    "threshold_at",
    "uniform_widths",
    "uniform_widths_at",
    "zero_filters",
]
