"""The sum of a filter's absolute weights (Li et al., Pruning Filters for Efficient ConvNets, 2017).

Shape suffixes: C channels of the group, O rows and I columns of a weight, K its kernel window.
"""

from dataclasses import dataclass

import numpy as np

from cup.criteria.ranking import Ranking
from cup.criteria.view import View
from cup.tracing.groups import ChannelGroup, Masks


@dataclass(frozen=True)
class L1:
    """The filter with the smallest sum of absolute weights goes first; of equal sums the highest id.

    Heights are those sums. They run over all conv and linear layers that write the group, and leave out what reads
    channels that are gone already (Li et al.'s greedy strategy; `PlanOptions.sequential=False` is their independent
    one). Biases and outgoing weights do not count: `PlanOptions.features` and `use_bias` change nothing here.
    """

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        scores_C = np.zeros(group.width)
        for place in group.producers:
            stays = masks.get((place.module, "in"), slice(None))
            filters_OIK = view.weights.filters(place.module)
            # One filter at a time, so that a large linear layer is never copied whole.
            sums_O = np.array([np.abs(filter_IK[stays]).sum(dtype=np.float64) for filter_IK in filters_OIK])
            mine = place.channel_of_index >= 0
            np.add.at(scores_C, place.channel_of_index[mine], sums_O[mine])
        order_C = np.lexsort((-np.arange(group.width), scores_C))
        return Ranking(order_C, scores_C[order_C[:-1]])
