"""Widths that take the same share of every group: SFP's and FPGM's shape, and that of a uniformly thinner network."""

from collections.abc import Sequence

from cup.complexity import FlopsByWidths
from cup.criteria import View
from cup.errors import CupError
from cup.planning.cuts import require_prunable
from cup.planning.options import DEFAULT_OPTIONS, PlanOptions, round_up
from cup.tracing.groups import ChannelGroup


def uniform_widths(
    groups: Sequence[ChannelGroup], share: float, options: PlanOptions = DEFAULT_OPTIONS
) -> dict[str, int]:
    """Group -> channels that stay when `share` of each group in scope goes, for `plan_by_counts` and `shrink_to`.

    What goes is rounded down to whole channels, as in SFP's released code, what stays up to the allowed widths.
    Raises CupError for a share outside 0 to below 1 and where no group may be pruned.
    """
    if not 0 <= share < 1:
        raise CupError(f"share of channels: found {share}, allowed: from 0 to below 1")
    widths = {}
    for group in require_prunable(groups, options):
        gone = int(group.width * share + 1e-9)  # so that 0.3 of 10 is 3, whatever the product rounds to
        widths[group.name] = round_up(group.width - gone, options.allowed_widths(group))
    return widths


def uniform_widths_at(view: View, target: float, options: PlanOptions = DEFAULT_OPTIONS) -> dict[str, int]:
    """The uniform widths whose FLOPs reduction, measured against `view.dense`, is the nearest to `target`.

    Where one share is short of the target and the next one beyond it, the first groups in network order take the
    deeper one. The narrowest widths there are where not even they reach it.
    Raises CupError for a target <= 1 and where no group may be pruned.
    """
    if not target > 1:
        raise CupError(f"target reduction: found {target}, allowed: a number above 1")
    flops = FlopsByWidths(view.model, view.groups, view.now)

    def reduction(widths: dict[str, int]) -> float:
        return view.dense.flops / flops.after({name: range(width) for name, width in widths.items()})

    low, high = 0.0, 1 - 1e-9
    for _ in range(30):  # far beyond one channel of the widest layer
        middle = (low + high) / 2
        low, high = (
            (middle, high) if reduction(uniform_widths(view.groups, middle, options)) < target else (low, middle)
        )
    passed, deep = [uniform_widths(view.groups, low, options)], uniform_widths(view.groups, high, options)
    for name, width in deep.items():
        passed.append(passed[-1] | {name: width})
    return min(passed, key=lambda widths: abs(reduction(widths) - target))
