"""Pictures of how filters were clustered: one PNG a group with its tree, the cut, and the filters that stay.

The tree is laid out here and not by SciPy's `dendrogram`, which recurses once for each level and gives up on the deep
chains that equal (dead) filters make.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from cup import GroupCut
from cup.criteria.ward import clusters_of
from train.errors import TrainError

MAX_LABELS = 64
ABOVE_THE_CUT = "0.65"
CLUSTERS = tuple(f"C{number}" for number in range(10) if number != 7)  # matplotlib's cycle without its grey


def draw_dendrograms(cuts: Sequence[GroupCut], threshold: float | None, directory: Path) -> list[Path]:
    """Write DIRECTORY/GROUP.png for each cut, whose ranking must have a tree, and return the paths.

    threshold: the height that made the plan; None where counts did. Raises TrainError where nothing can be written.
    """
    paths = [directory / f"{cut.group.name}.png" for cut in cuts]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for cut, path in zip(cuts, paths, strict=True):
            _draw(cut, threshold, path)
    except OSError as error:
        raise TrainError(f"cannot write the dendrograms to {directory}: {error.strerror}") from error
    return paths


def leaf_order(tree: np.ndarray) -> np.ndarray:
    """int64 (C,): channels from left to right, so that no two branches of SciPy's linkage `tree` cross."""
    count = len(tree) + 1
    order, stack = [], [2 * count - 2]
    while stack:
        node = stack.pop()
        if node < count:
            order.append(node)
        else:
            left, right = tree[node - count, :2].astype(int)
            stack += [right, left]
    return np.array(order)


def cut_height(cut: GroupCut, threshold: float | None) -> float:
    """Where the cut crosses the tree: at the threshold, or between two merges where the width was given or rounded."""
    heights, made = cut.ranking.heights, cut.group.width - len(cut.kept)
    below = heights[made - 1] if made else 0.0
    above = heights[made] if made < len(heights) else 1.05 * below
    if threshold is not None and below <= threshold and (threshold < above or made == len(heights)):
        return threshold
    return float(below + above) / 2


def _draw(cut: GroupCut, threshold: float | None, path: Path) -> None:
    count, kept = cut.group.width, len(cut.kept)
    wide = count > MAX_LABELS
    is_cut = kept < count or threshold is not None
    fig, axis = plt.subplots(figsize=(min(26, max(8, 0.15 * count)), 6 if wide else 4.5), layout="constrained")
    order = leaf_order(cut.ranking.tree)
    colors = _channel_colors(clusters_of(cut.ranking.tree, kept), order)
    height = cut_height(cut, threshold)
    top = 1.05 * max(height, cut.ranking.heights.max(initial=0)) or 1.0
    _draw_tree(axis, cut, order, colors)
    if is_cut:
        axis.axhline(height, color="black", linestyle="--", linewidth=1, label=f"cut at {height:.3f}")
    _draw_leaves(axis, cut, order, colors, strip=0.05 * top, mark=is_cut)
    at = "" if threshold is None else f", t {threshold:.3f}"
    becomes = f" -> {kept}" if kept < count else ""
    axis.set_title(f"{cut.group.name}: {count}{becomes} channels{at}", loc="left")
    axis.set_ylabel("Ward height")
    axis.set_ylim(-0.05 * top, top)
    axis.set_xlim(-1, count)
    axis.spines[["top", "right"]].set_visible(False)
    if is_cut:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def _channel_colors(clusters_C: np.ndarray, order: np.ndarray) -> list[str]:
    """The color of each channel's cluster; neighbours in the picture differ."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters_C[order].tolist()))}
    return [CLUSTERS[numbers[cluster] % len(CLUSTERS)] for cluster in clusters_C.tolist()]


def _draw_tree(axis: Axes, cut: GroupCut, order: np.ndarray, colors: Sequence[str]) -> None:
    count = len(order)
    x, heights = np.empty(2 * count - 1), np.concatenate([np.zeros(count), cut.ranking.heights])
    x[order] = np.arange(count)
    node_colors = list(colors)
    links, link_colors = [], []
    for node, (left, right) in enumerate(cut.ranking.tree[:, :2].astype(int), start=count):
        x[node] = (x[left] + x[right]) / 2
        node_colors.append(node_colors[left])
        below_the_cut = node - count < count - len(cut.kept)
        links.append(
            [(x[left], heights[left]), *((x[n], heights[node]) for n in (left, right)), (x[right], heights[right])]
        )
        link_colors.append(node_colors[node] if below_the_cut else ABOVE_THE_CUT)
    axis.add_collection(LineCollection(links, colors=link_colors, linewidths=1.2 if count <= MAX_LABELS else 0.8))


def _draw_leaves(axis: Axes, cut: GroupCut, order: np.ndarray, colors: Sequence[str], strip: float, mark: bool) -> None:
    """A triangle (if `mark`) at each filter that stays, in a strip under the tree; channel numbers, as many as fit."""
    if mark:
        stays = np.flatnonzero(np.isin(order, cut.kept))
        shown = [colors[channel] for channel in order[stays]]
        axis.scatter(stays, np.full(len(stays), -strip / 2), marker="^", s=30, color=shown)
        axis.scatter([], [], marker="^", s=30, color="black", label="stays")
    step = math.ceil(len(order) / MAX_LABELS)
    axis.set_xticks(range(0, len(order), step), order[::step], rotation=90, fontsize=7)
    axis.set_xlabel("channel" if step == 1 else f"channel (one in {step} is named)")
