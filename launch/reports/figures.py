"""Figures of runs, a PNG file each: one colour a group of equal runs, thin lines its runs, a bold one their mean."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from launch.reports.read import Group, Run
from launch.reports.tables import kinds_of

DENSE_COLOR = "#404040"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by all eyes
MARKERS = "osD^vP"
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1, 1, 1)))  # so that of two equal curves both are seen
KIND_COLORS = {
    "step": "#0072B2",
    "data_wait": "#E69F00",
    "resize": "#D55E00",
    "resize_warmup": "#CC79A7",
    "compile": "#F0E442",
    "eval": "#009E73",
    "save": "#56B4E9",
    "startup": "#BBBBBB",
    "lost": "#000000",
    "other": "#777777",
}
# What a smaller network can shorten, and what shrinking costs.
TRAINING_KINDS = ("data_wait", "step", "resize", "resize_warmup", "compile")

Value = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Figure:
    """A PNG file; the caption says what is seen and how it was made."""

    path: Path
    title: str
    caption: str


def draw_figures(groups: list[Group], directory: Path) -> list[Figure]:
    """Write all figures that these runs give and return them in the order of a report."""
    whole = (draw_epochs, draw_accuracy, draw_seconds, draw_speed)
    shrinking = [group for group in groups if any(run.resizes for run in group.runs)]
    return [draw(groups, directory) for draw in whole] + [draw_widths(group, directory) for group in shrinking]


def draw_epochs(groups: list[Group], directory: Path) -> Figure:
    """FLOPs reduction, threshold, top-1 and seconds of training over the epochs."""
    panels: list[tuple[str, Value]] = [
        ("FLOPs reduction (x)", lambda line: line["flops_reduction"]),
        ("top-1 accuracy (%)", lambda line: line["top1"]),
        ("threshold t of the cut (Ward height)", lambda line: line["threshold"]),
        ("training time (s per epoch)", training_seconds),
    ]
    with _figure(directory / "epochs.png", groups, 2, 2, figsize=(9, 5.8), sharex=True) as axes:
        for axis, (label, value) in zip(axes.flat, panels, strict=True):
            _curves(axis, groups, value)
            axis.set_ylabel(label)
            _epochs_on_x(axis)
        axes[0, 0].set_ylim(bottom=0.95)
        axes[1, 1].set_ylim(bottom=0)
        if not axes[1, 0].has_data():
            axes[1, 0].text(0.5, 0.5, "no cut", transform=axes[1, 0].transAxes, ha="center", color="#777777")
            axes[1, 0].set_yticks([])
        for axis in axes[1]:
            axis.set_xlabel("epoch")
    caption = (
        "FLOPs reduction and height of the cut, accuracy on the validation set, and what an epoch of training takes: "
        f"steps, waiting for data, resizes and what follows them; no evaluation. {_lines(groups)}"
    )
    return Figure(directory / "epochs.png", "Over the epochs", caption)


def draw_accuracy(groups: list[Group], directory: Path) -> Figure:
    """Top-1 against GPU hours: the whole training, and its end at a larger scale."""
    with _figure(directory / "accuracy.png", groups, 1, 2, figsize=(9, 3.8)) as axes:
        for axis, share in zip(axes, (1.0, 0.4), strict=True):
            for number, group in enumerate(groups):
                style = _style(groups, number)
                for run in group.runs:
                    lines = run.epochs[-max(2, round(share * len(run.epochs))) :]
                    before = run.hours - run.done["gpu_hours"]
                    points = [(before + line["gpu_hours"], line["top1"]) for line in lines]
                    axis.plot(*zip(*points, strict=True), color=style["color"], linewidth=1, alpha=0.6)
                _end(axis, group, style)
            axis.set_xlabel(_hours_label(groups))
            axis.xaxis.set_major_locator(MaxNLocator(6))
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("top-1 accuracy (%)")
        axes[0].set_title("whole training", fontsize=10)
        axes[1].set_title("the last 40% of the epochs", fontsize=10)
    several = any(len(group.runs) > 1 for group in groups)
    spread = ", at the mean with a standard deviation each way" if several else ""
    caption = f"Accuracy reached for the GPU hours spent, a line a run; the mark is the end{spread}."
    return Figure(directory / "accuracy.png", "Top-1 against GPU hours", caption)


def draw_seconds(groups: list[Group], directory: Path) -> Figure:
    """Where the seconds of each epoch went, a panel a group, bars stacked by kind."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    order = list(KIND_COLORS)
    kinds = sorted(kinds_of(groups), key=lambda kind: order.index(kind) if kind in order else len(order))
    path = directory / "seconds.png"
    size = (9, 1.0 + 2.6 * rows)
    with _figure(path, [], rows, columns, figsize=size, sharey=True, squeeze=False) as axes:
        for axis, group in zip(axes.flat, groups, strict=False):
            epochs = [line["epoch"] for line in group.one.epochs]
            bottom = np.zeros(len(epochs))
            for kind in kinds:
                height = np.array(_means(group, lambda line, kind=kind: line["seconds"].get(kind, 0.0), epochs))
                color = KIND_COLORS.get(kind, "#AA4499")
                axis.bar(epochs, height, bottom=bottom, width=0.9, color=color, label=kind.replace("_", " "))
                bottom += height
            axis.set_title(_named(group), fontsize=10 if columns < 3 else 8)
            axis.set_xlim(epochs[0] - 0.6, epochs[-1] + 0.6)
            _epochs_on_x(axis)
            axis.set_xlabel("epoch")
        for axis in axes[:, 0]:
            axis.set_ylabel("seconds per epoch")
        for axis in list(axes.flat)[len(groups) :]:
            axis.set_visible(False)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(
            handles, labels, loc="outside lower center", ncols=min(9, len(labels)), frameon=False, fontsize=9
        )
    caption = (
        "Every second of a run, charged to one kind by the ledger; means over the ranks"
        f"{' and over the runs of a group' if any(len(g.runs) > 1 for g in groups) else ''}. What comes before the "
        "first step (startup) is charged to the first epoch, saving an epoch's checkpoint to the next one."
    )
    return Figure(path, "Seconds by kind", caption)


def draw_speed(groups: list[Group], directory: Path) -> Figure:
    """Images a second over the epochs, resizes marked; of shrinking runs the speed-up against the FLOPs reduction."""
    path = directory / "images_per_s.png"
    shrinking = [group for group in groups if group.one.shrinks]
    with _figure(path, groups, 1, 2 if shrinking else 1, figsize=(9, 3.8), squeeze=False) as [axes]:
        _curves(axes[0], groups, lambda line: line["images_per_s"])
        for group in shrinking:
            style = _style(groups, groups.index(group))
            for run in group.runs:
                resized = {event["epoch"] for event in run.resizes}
                points = [(line["epoch"], line["images_per_s"]) for line in run.epochs if line["epoch"] in resized]
                axes[0].scatter(*_columns(points), marker="|", s=160, color=style["color"], linewidths=1.5)
                speedups = _columns(_speedups(run, groups))
                axes[1].scatter(*speedups, s=14, color=style["color"], marker=style["marker"], alpha=0.7)
        axes[0].set_ylim(bottom=0)
        axes[0].set_xlabel("epoch")
        axes[0].set_ylabel("training images/s, all ranks")
        _epochs_on_x(axes[0])
        if shrinking:
            most = max(line["flops_reduction"] for group in shrinking for run in group.runs for line in run.epochs)
            axes[1].plot([1, most], [1, most], color="#777777", linestyle="--", linewidth=1)
            axes[1].text(most, most, "all of it ", ha="right", va="bottom", color="#777777", fontsize=9)
            axes[1].set_xlabel("FLOPs reduction (x)")
            axes[1].set_ylabel("speed-up over dense (x)")
            axes[1].grid(alpha=0.3)
    caption = "Speed of training, waiting for data and the slow first step after a resize included"
    if shrinking:
        caption = (
            f"Left: {caption[0].lower()}{caption[1:]}; a stroke marks each epoch that began with a resize. Right: how "
            "much of the FLOPs reduction the clock sees, a point an epoch, against the comparable dense runs (or, "
            "without one, the run's own full epochs)"
        )
    return Figure(path, "Images a second", f"{caption}.")


def draw_widths(group: Group, directory: Path) -> Figure:
    """A heat map of a run's layers: channels left as a share of those at the start."""
    run = next(run for run in group.runs if run.resizes)
    layers = list(run.epochs[0]["widths"])
    full = widths_at_start(run)
    shares = np.array([[100 * line["widths"].get(name, 0) / full[name] for line in run.epochs] for name in layers])
    path = directory / f"widths_{group.name.replace('/', '_')}.png"
    with _figure(path, [], 1, 1, figsize=(9, max(2.6, 1.2 + 0.19 * len(layers)))) as axis:
        first, last = run.epochs[0]["epoch"], run.epochs[-1]["epoch"]
        edges = np.arange(first, last + 2) - 0.5
        mesh = axis.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, shares, cmap="viridis", vmin=0, vmax=100)
        axis.set_yticks(range(len(layers)), layers, fontsize=8)
        axis.invert_yaxis()
        resized = [event["epoch"] - 0.5 for event in run.resizes]
        axis.plot(resized, np.full(len(resized), -0.5), "v", color="#D55E00", clip_on=False, markersize=6)
        right, widths = axis.secondary_yaxis("right"), run.epochs[-1]["widths"]
        right.set_yticks(range(len(layers)), [f"{full[name]} → {widths.get(name, 0)}" for name in layers], fontsize=8)
        right.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.figure.colorbar(mesh, ax=axis, label="width (% of the start)", pad=0.02)
    which = f" of {run.name}" if len(group.runs) > 1 else ""
    caption = (
        f"Channels left in each layer that may shrink{which}, in the order of the network; triangles mark resizes, the "
        "right side says from how many channels to how many."
    )
    return Figure(path, f"Widths: {group.name}", caption)


def training_seconds(line: dict[str, Any]) -> float:
    """Of an epoch line: what a smaller network can shorten, and what shrinking it costs."""
    return sum(line["seconds"].get(kind, 0.0) for kind in TRAINING_KINDS)


def widths_at_start(run: Run) -> dict[str, int]:
    """Layer -> channels before the first cut of this run."""
    first = run.epochs[0]
    removed = [event["removed"] for event in run.resizes if event["epoch"] <= first["epoch"]]
    return {name: width + sum(one.get(name, 0) for one in removed) for name, width in first["widths"].items()}


@contextmanager
def _figure(path: Path, groups: list[Group], rows: int, columns: int, **options: Any) -> Iterator[Any]:
    """A figure's axes, to be drawn in; saved to `path` with a legend of `groups` on top, if there are any."""
    with matplotlib.rc_context({"text.parse_math": False}):  # a run's name may hold a $
        yield from _drawn(path, groups, rows, columns, **options)


def _drawn(path: Path, groups: list[Group], rows: int, columns: int, **options: Any) -> Iterator[Any]:
    fig, axes = plt.subplots(rows, columns, layout="constrained", **options)
    try:
        yield axes
        for axis in fig.axes:
            axis.spines[["top", "right"]].set_visible(False)
            for other in axis.child_axes:
                other.spines[:].set_visible(False)
        if groups:
            styles = [_style(groups, number) for number in range(len(groups))]
            handles = [Line2D([], [], **style, linewidth=2, markersize=5) for style in styles]
            labels = [_named(group) for group in groups]
            fits = max(1, 110 // (max(map(len, labels)) + 8))
            fig.legend(handles, labels, loc="outside upper center", ncols=min(fits, len(labels)), frameon=False)
        fig.savefig(path, dpi=150)
    finally:
        plt.close(fig)


def _curves(axis: Axes, groups: list[Group], value: Value) -> None:
    """A line a group over the epochs, and thin ones for its runs where it has several."""
    for number, group in enumerate(groups):
        style = _style(groups, number)
        several = len(group.runs) > 1
        for run in group.runs if several else ():
            points = [(line["epoch"], value(line)) for line in run.epochs if value(line) is not None]
            axis.plot(*_columns(points), color=style["color"], linewidth=0.8, alpha=0.45)
        epochs = [line["epoch"] for line in group.one.epochs]
        means = zip(epochs, _means(group, value, epochs), strict=True)
        points = [(epoch, mean) for epoch, mean in means if mean is not None]
        if points:
            axis.plot(*_columns(points), linewidth=1.8, markersize=3.5 if len(epochs) <= 30 else 0, **style)
    axis.grid(alpha=0.3)


def _means(group: Group, value: Value, epochs: list[int]) -> list[float | None]:
    """The mean over the runs at each epoch, of those that have a value there."""
    found: dict[int, list[float]] = {epoch: [] for epoch in epochs}
    for run in group.runs:
        for line in run.epochs:
            if line["epoch"] in found and value(line) is not None:
                found[line["epoch"]].append(value(line))
    return [statistics.mean(values) if values else None for values in found.values()]


def _end(axis: Axes, group: Group, style: dict[str, Any]) -> None:
    """A mark where the runs end on average, with a standard deviation each way where there are several."""
    ends = [(run.hours, run.done["top1"]) for run in group.runs]
    means = [statistics.mean(values) for values in _columns(ends)]
    deviations = [statistics.stdev(values) if len(values) > 1 else None for values in _columns(ends)]
    axis.errorbar(
        *means,
        xerr=deviations[0],
        yerr=deviations[1],
        color=style["color"],
        marker=style["marker"],
        capsize=3,
        zorder=3,
    )


def _speedups(run: Run, groups: list[Group]) -> list[tuple[float, float]]:
    """(FR, images/s over dense images/s) of each epoch; empty where no dense speed is known or images grow."""
    if run.settings.get("data.start_size"):
        return []
    others = [other for group in groups for other in group.runs if other.is_dense]
    dense = [line for other in others if not other.differences(run) for line in other.epochs]
    full = dense or [line for line in run.epochs if line["flops_reduction"] == 1.0]
    if not full:
        return []
    speed = statistics.median(line["images_per_s"] for line in full)
    return [(line["flops_reduction"], line["images_per_s"] / speed) for line in run.epochs]


def _style(groups: list[Group], number: int) -> dict[str, Any]:
    """Grey for the first dense group; a colour, a mark and dashes of its own for every other."""
    dense = next((n for n, group in enumerate(groups) if group.one.is_dense), None)
    if number == dense:
        return {"color": DENSE_COLOR, "marker": "x", "linestyle": "-"}
    rank = number - (dense is not None and number > dense)
    marks = {"marker": MARKERS[rank % len(MARKERS)], "linestyle": DASHES[rank % len(DASHES)]}
    return {"color": COLORS[rank % len(COLORS)], **marks}


def _named(group: Group) -> str:
    count = f", {len(group.runs)} runs" if len(group.runs) > 1 else ""
    return f"{group.name}: {group.one.method}{count}"


def _lines(groups: list[Group]) -> str:
    several = any(len(group.runs) > 1 for group in groups)
    return "Bold: mean of the runs of a group; thin: each run." if several else ""


def _hours_label(groups: list[Group]) -> str:
    on_cpu = any(run.done["device"] == "cpu" for group in groups for run in group.runs)
    return "GPU hours (on the CPU: ranks x wall hours)" if on_cpu else "GPU hours"


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _epochs_on_x(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
