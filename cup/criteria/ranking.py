"""What a criterion is, and what it says of a group: the order in which the group's channels go.

Shape suffix: C channels of the group.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from cup.criteria.view import View
from cup.errors import CupError
from cup.tracing.groups import ChannelGroup, Masks


@dataclass(frozen=True, eq=False)
class Ranking:
    """A group's channels from the first that goes to the last that stays. Every planner works on rankings alone.

    order_C: int64 (C,), ids; a group is narrowed by removing a prefix, so the sets kept at smaller widths are nested.
    heights: float64 (C - 1,), ascending, from 0: the loss that each removal costs, comparable across groups, in the
        criterion's own unit (CUP: Ward distance of features; L1: sum of absolute weights). A threshold t removes the
        channels with heights up to t; the last channel in the order always stays.
    tree: SciPy's linkage matrix (C - 1, 4) that the order comes from, where there is one: merge i removes order_C[i],
        until then one of the two channels that stood for the clusters that it joins.

    Raises CupError where order_C is no permutation or the heights are not as above.
    """

    order_C: np.ndarray
    heights: np.ndarray
    tree: np.ndarray | None = None

    def __post_init__(self) -> None:
        order_C, heights, count = self.order_C, self.heights, len(self.order_C)
        if order_C.dtype.kind not in "iu" or not np.array_equal(np.sort(order_C), np.arange(count)):
            raise CupError(f"a ranking's order: found {_shown(order_C)}, allowed: each id from 0 to {count - 1} once")
        fits = heights.shape == (count - 1,) and np.isfinite(heights).all()
        if not fits or (np.diff(heights, prepend=0.0) < 0).any():
            raise CupError(
                f"a ranking's heights for {count} channels: found {_shown(heights)}, allowed: {count - 1} finite "
                "numbers from 0, ascending"
            )

    def width_at(self, t: float) -> int:
        """Channels that a cut at height t leaves: heights equal to t are below the cut."""
        return len(self.order_C) - int(np.searchsorted(self.heights, t, side="right"))

    def kept(self, width: int) -> tuple[int, ...]:
        """Sorted ids of the `width` channels that stay the longest."""
        return tuple(np.sort(self.order_C[len(self.order_C) - width :]).tolist())

    def folded(self, width: int) -> tuple[int, ...]:
        """By id of a channel, the one of `kept(width)` that stands for its cluster. Raises CupError without a tree."""
        into_C = np.arange(len(self.order_C))
        gone = len(self.order_C) - width
        into_C[self.order_C[:gone]] = self._heirs[:gone]
        while not np.array_equal(into_C, further_C := into_C[into_C]):
            into_C = further_C
        return tuple(into_C.tolist())

    @cached_property
    def _heirs(self) -> np.ndarray:
        """int64 (C - 1,): the channel that stands for both clusters once order_C[i] is gone."""
        if self.tree is None:
            raise CupError("channels can be folded only where the criterion makes clusters, as cup does")
        stand_for, heirs = list(range(len(self.order_C))), []  # of each node of the tree, its channel
        for gone, (left, right) in zip(self.order_C.tolist(), self.tree[:, :2].astype(np.int64).tolist(), strict=False):
            stand_for.append(stand_for[left] if stand_for[right] == gone else stand_for[right])
            heirs.append(stand_for[-1])
        return np.array(heirs, dtype=np.int64)


def lowest_first(scores_C: np.ndarray) -> Ranking:
    """The channel with the lowest score (finite, from 0) goes first, of equals the highest id; heights are the scores.

    Raises CupError as `Ranking` does.
    """
    order_C = np.lexsort((-np.arange(len(scores_C)), scores_C))
    return Ranking(order_C, scores_C[order_C[:-1]])


@runtime_checkable
class Criterion(Protocol):
    """Which channels go first. Any object with this method can be `PlanOptions.criterion`.

    Planners share one object between all groups and plans, so it keeps no state of a model; what is expensive to
    compute goes into `view.remember`.
    """

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        """The removal order of the group's channels; equal inputs give equal rankings.

        view: the model and its cost, to be read and not changed; `view.weights` reads weights safely.
        masks: the connections that are left after the cuts of other groups: (module, axis) -> bool over the axis;
            axes that lose none are absent. What goes anyway should not count in the ranking.
        """
        ...


def _shown(values: np.ndarray) -> str:
    return np.array2string(values, threshold=6, edgeitems=2, separator=", ").replace("\n", "")
