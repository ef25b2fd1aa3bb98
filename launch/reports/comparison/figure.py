"""Top-1 against hours: every run a point, and the Pareto front of the means."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from launch.reports.comparison.results import Comparison, Row, spread_of, top1
from launch.reports.figures import COLORS, DENSE_COLOR, MARKERS, Figure


def draw_front(comparison: Comparison, path: Path) -> Figure:
    """A panel a setting; what does not depend on settings is in each."""
    settings = [name for name in comparison.grid.settings if any(row.setting == name for row in comparison.rows)] or [
        ""
    ]
    with matplotlib.rc_context({"text.parse_math": False}):  # a name may hold a $
        size = (4.6 + 4.4 * len(settings), 5.2)
        fig, axes = plt.subplots(1, len(settings), figsize=size, layout="constrained", squeeze=False, sharey=True)
        for axis, setting in zip(axes[0], settings, strict=True):
            _draw(axis, comparison, [row for row in comparison.rows if row.setting in ("", setting)])
            axis.set_title(setting, fontsize=10)
        axes[0, 0].set_ylabel("top-1 accuracy (%)")
        handles = {
            label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        fig.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=9)
        fig.savefig(path, dpi=150)
        plt.close(fig)
    caption = (
        "Small marks: runs, each with all that it cost, of a network that was cut its dense training too "
        f"({comparison.currency.note}). Large marks: means over seeds, filled for methods, open for controls. The line "
        "is the Pareto front of the means: nothing to the left of it and above it was measured."
    )
    return Figure(path, f"Top-1 against {comparison.currency.name}", caption)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, gain), those that no other one beats in one without being worse in the other, by cost ascending."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _draw(axis: Axes, comparison: Comparison, rows: list[Row]) -> None:
    means = []
    order = list(comparison.grid.entries)
    for row in rows:
        hours, accuracy = row.by_seed(comparison.currency.hours), row.by_seed(top1)
        color, marker = _style(order.index(row.entry.name))
        axis.scatter(hours.values(), accuracy.values(), s=12, color=color, marker=marker, alpha=0.55, linewidths=0.8)
        mean = (spread_of(hours)[0], spread_of(accuracy)[0])
        face = "none" if row.entry.is_control else color
        axis.scatter(
            *mean, s=75, facecolors=face, edgecolors=color, marker=marker, linewidths=1.5, label=row.entry.name
        )
        means.append(mean)
    front = pareto_front(means)
    axis.step(*zip(*front, strict=True), where="post", color="#777777", linewidth=1, zorder=0)
    axis.set_xlim(left=0)
    axis.set_xlabel(comparison.currency.name)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)


def _style(number: int) -> tuple[str, str]:
    """A colour and a mark, no two alike for 42 entries; the first is grey."""
    colors = (DENSE_COLOR, *COLORS)
    return colors[number % len(colors)], MARKERS[number % len(MARKERS)]
