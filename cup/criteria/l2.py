"""The Euclidean norm of a filter: the criterion of SFP (He et al., Soft Filter Pruning, 2018, arXiv 1808.06866)."""

from dataclasses import dataclass

import numpy as np

from cup.criteria.filters import sum_over_filters
from cup.criteria.ranking import Ranking, lowest_first
from cup.criteria.view import View
from cup.tracing.groups import ChannelGroup, Masks


@dataclass(frozen=True)
class L2:
    """The filter with the smallest norm goes first; of equal norms the highest id.

    Heights are those norms, over all weights that write a channel, in all conv and linear layers of the group together;
    what reads channels that are gone already is left out. Biases and outgoing weights do not count.
    """

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        squares_C = sum_over_filters(group, view, masks, lambda filter_IK: np.square(filter_IK, dtype=np.float64).sum())
        return lowest_first(np.sqrt(squares_C))
