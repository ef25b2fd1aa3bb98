"""The largest weight that a channel has anywhere: PruneTrain's criterion (Lym et al., 2019, arXiv 1901.09290).

Shape suffixes: C channels of the group, O rows and I columns of a weight, K its kernel window.
"""

from dataclasses import dataclass

import numpy as np

from cup.criteria.ranking import Ranking, lowest_first
from cup.criteria.view import View
from cup.tracing.groups import ChannelGroup, Masks, Place


@dataclass(frozen=True)
class MaxAbs:
    """The channel whose largest absolute weight is the smallest goes first; of equal ones the highest id.

    Heights are those weights. They count all conv and linear layers that write or read the group, so a cut at height t
    removes a channel only if none of its weights is above t in any of them; of a residual stream the union of the
    layers' live channels stays, as in the paper. Connections to channels that are gone already are left out.
    """

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        scores_C = np.zeros(group.width)
        for place in (*group.producers, *group.consumers):
            largest = _largest(view.weights.filters(place.module), place, masks)
            mine = place.channel_of_index >= 0
            np.maximum.at(scores_C, place.channel_of_index[mine], largest[mine])
        return lowest_first(scores_C)


def _largest(filters_OIK: np.ndarray, place: Place, masks: Masks) -> np.ndarray:
    """The largest absolute weight of each index of the place's axis, 0 where all connections are gone."""
    other, axis = ("in", 0) if place.axis == "out" else ("out", 1)
    stays = masks.get((place.module, other))
    if stays is not None:
        filters_OIK = filters_OIK.compress(stays, axis=1 - axis)
    others = tuple(dim for dim in range(filters_OIK.ndim) if dim != axis)
    return np.maximum(filters_OIK.max(axis=others, initial=0), -filters_OIK.min(axis=others, initial=0))
