"""Filters near the geometric median of their layer (FPGM: He et al., 2019, arXiv 1811.00250).

Shape suffixes: C channels of the group, F filters of one channel in one layer, X weights of a filter.
"""

from dataclasses import dataclass

import numpy as np

from cup.criteria.features import Gram, add_products
from cup.criteria.ranking import Ranking, lowest_first
from cup.criteria.view import View
from cup.tracing.groups import ChannelGroup, Masks


@dataclass(frozen=True)
class GeometricMedian:
    """The filter whose distances to all others have the smallest sum goes first; of equal sums the highest id.

    Others can stand in for a filter in the middle of them. Heights are those sums of Euclidean distances. A filter is
    all weights that write a channel, in all conv and linear layers of the group together; what reads channels that are
    gone already is left out. The paper's optional first stage, by norm, is not part of it.
    """

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        squared_CC = np.zeros((group.width, group.width))
        for place in group.producers:
            filters = view.weights.filters(place.module)
            stays = masks.get((place.module, "in"), np.ones(filters.shape[1], dtype=bool))
            stays_X = np.repeat(stays, int(np.prod(filters.shape[2:])))
            for index_C in _filters_of_channels(place.channel_of_index, group.width).T:
                gram = Gram.empty(group.width)
                add_products(gram, filters[index_C].reshape(group.width, -1), stays_X)
                products_CC, squares_C = gram.products_CC, np.diag(gram.products_CC)
                squared_CC += squares_C[:, None] + squares_C - 2 * products_CC
        squared_CC = np.triu(squared_CC, 1)
        squared_CC += squared_CC.T
        return lowest_first(np.sqrt(np.maximum(squared_CC, 0)).sum(axis=1))


def _filters_of_channels(channel_of_index: np.ndarray, width: int) -> np.ndarray:
    """int64 (C, F): the indices of each channel on a place's axis, equally many of every channel."""
    mine = np.flatnonzero(channel_of_index >= 0)
    return mine[np.argsort(channel_of_index[mine], kind="stable")].reshape(width, -1)
