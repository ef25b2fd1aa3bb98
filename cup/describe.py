"""The channel groups of a model as a table for people."""

from typing import Any

from torch import nn

from cup.tracing.groups import ChannelGroup, Place
from cup.tracing.trace import channel_groups


def describe(model: nn.Module, example_input: Any = None, *, allow_hooks: bool = False) -> str:
    """One line a channel group: name, width, its layers, and whether and why it may shrink.

    The arguments are those of `channel_groups`.
    A width of 32 x 4 means 32 channels of four filters each, bound together, by a grouped convolution for example.
    """
    rows = [("group", "width", "written by", "read by", "may shrink")]
    rows += [_row(group) for group in channel_groups(model, example_input, allow_hooks=allow_hooks)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(group: ChannelGroup) -> tuple[str, str, str, str, str]:
    verdict = f"no: {group.frozen}" if group.frozen else "yes" if group.inner else 'with scope "all" (residual)'
    filters = int((group.producers[0].channel_of_index >= 0).sum()) // group.width
    width = str(group.width) if filters == 1 else f"{group.width} x {filters}"
    return group.name, width, _names(group.producers), _names(group.consumers), verdict


def _names(places: tuple[Place, ...]) -> str:
    names = [place.module for place in places]
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"
