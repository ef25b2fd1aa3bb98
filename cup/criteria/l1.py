"""The sum of a filter's absolute weights (Li et al., Pruning Filters for Efficient ConvNets, 2017)."""

from dataclasses import dataclass

import numpy as np

from cup.criteria.filters import sum_over_filters
from cup.criteria.ranking import Ranking, lowest_first
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
        return lowest_first(
            sum_over_filters(group, view, masks, lambda filter_IK: np.abs(filter_IK).sum(dtype=np.float64))
        )
