"""The factors of batch norm (Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017)."""

from dataclasses import dataclass

import numpy as np

from cup.criteria.ranking import Ranking, lowest_first
from cup.criteria.view import View
from cup.errors import CupError
from cup.tracing.groups import ChannelGroup, Masks


@dataclass(frozen=True)
class BatchNormScale:
    """The channel with the smallest absolute batch-norm factor goes first; of equal factors the highest id.

    Heights are those factors, added up where several batch norms follow a group. Masks change nothing. Network slimming
    trains with an L1 penalty on the factors, which is no part of the criterion.
    """

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        """Raises CupError for a group that no batch norm with factors follows."""
        scores_C = np.zeros(group.width)
        is_followed = False
        for place in group.followers:
            scale_O = view.weights.batch_norm_scale(place.module)
            if scale_O is not None:
                is_followed = True
                mine = place.channel_of_index >= 0
                np.add.at(scores_C, place.channel_of_index[mine], np.abs(scale_O[mine]))
        if not is_followed:
            raise CupError(
                f"criterion bn_scale: no batch norm with factors follows {group.name}, so its channels cannot be "
                "ranked; take another criterion"
            )
        return lowest_first(scores_C)
