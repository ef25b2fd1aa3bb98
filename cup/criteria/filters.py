"""What criteria by the size of weights share: a number for each filter, added up over the layers of a group.

Shape suffixes: C channels of the group, O rows and I columns of a weight, K its kernel window.
"""

from collections.abc import Callable

import numpy as np

from cup.criteria.view import View
from cup.tracing.groups import ChannelGroup, Masks


def sum_over_filters(
    group: ChannelGroup, view: View, masks: Masks, measure: Callable[[np.ndarray], float]
) -> np.ndarray:
    """float64 (C,): the sum of `measure` over all filters, of all conv and linear layers, that write each channel.

    measure: of one filter (I, K), without the connections to channels that are gone already. One filter at a time, so
        that a large linear layer is never copied whole.
    """
    scores_C = np.zeros(group.width)
    for place in group.producers:
        stays = masks.get((place.module, "in"), slice(None))
        filters_OIK = view.weights.filters(place.module)
        mine = place.channel_of_index >= 0
        measured = np.array([measure(filter_IK[stays]) for filter_IK in filters_OIK[mine]])
        np.add.at(scores_C, place.channel_of_index[mine], measured)
    return scores_C
