"""Fold: the channels of a cluster become one, which does what all of them did together.

Model folding (Wang et al., ICLR 2025, arXiv 2502.10216): what writes a channel is averaged over its cluster, what reads
it is added up. If the channels of a cluster are equal, the network computes what it did.

Shape suffixes: C channels of a group, N indices of an axis that stay, K old indices that become one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from cup.criteria.weights import Weights
from cup.plan import PrunePlan
from cup.tracing.groups import ChannelGroup, Masks, Place
from cup.tracing.layers import AxisName
from cup.tracing.narrowing import Merge, Merges

MAX_GAIN = 10.0
"""What a channel may count for, against what its cluster becomes: one that batch norm nearly silences explains none."""


def fold_merges(model: nn.Module, plan: PrunePlan, groups: Sequence[ChannelGroup], masks: Masks) -> Merges:
    """How the axes of the groups that the plan folds are merged.

    Layers that write a channel, and norms and depthwise convolutions on the way: the mean of the cluster, statistics
    included. Layers that read it: the sum, each channel times its gain (`_gains_C`).
    masks: what stays of each axis. Raises CupError for batch-norm factors that are not finite.
    """
    taken: dict[tuple[str, AxisName], _Axis] = {}
    weights = Weights(model)
    for group in groups:
        if group.name not in plan.folded:
            continue
        into_C = np.array(plan.folded[group.name])
        for place in group.places:
            axis = taken.setdefault((place.module, place.axis), _Axis(masks[place.module, place.axis]))
            is_read = place in group.consumers
            axis.take(
                place, into_C, _gains_C(weights, group, place, into_C) if is_read else 1 / _cluster_sizes_C(into_C)
            )
    return {key: axis.merge() for key, axis in taken.items()}


class _Axis:
    """One layer's axis, on which one group or several (behind a concat) are merged."""

    def __init__(self, stays: np.ndarray) -> None:
        self._stays = stays
        self._members: list[list[tuple[int, float]]] = [[(index, 1.0)] for index in range(len(stays))]

    def take(self, place: Place, into_C: np.ndarray, factors_C: np.ndarray) -> None:
        """Merge the indices of the group's channels. factors_C: what each channel counts."""
        indices = [np.flatnonzero(place.channel_of_index == channel).tolist() for channel in range(len(into_C))]
        for kept in np.unique(into_C).tolist():
            channels = np.flatnonzero(into_C == kept).tolist()
            # A channel may have several indices: those behind a flatten, or the filters of a grouped convolution.
            for number, index in enumerate(indices[kept]):
                self._members[index] = [
                    (indices[channel][number], float(factors_C[channel]))
                    for channel in channels
                    if number < len(indices[channel])
                ]

    def merge(self) -> Merge:
        members = [self._members[index] for index in np.flatnonzero(self._stays).tolist()]
        longest = max(map(len, members))
        padded = [[*own, *[(own[0][0], 0.0)] * (longest - len(own))] for own in members]
        return Merge(
            members_NK=torch.tensor([[index for index, _ in own] for own in padded]),
            factors_NK=torch.tensor([[factor for _, factor in own] for own in padded], dtype=torch.float64),
        )


def _gains_C(weights: Weights, group: ChannelGroup, reader: Place, into_C: np.ndarray) -> np.ndarray:
    """float64 (C,): what each channel carries to `reader`, over what its cluster will carry there.

    Batch norm brings all channels to deviation one and then to its factor. So of two channels with proportional filters
    the outputs relate as the factors of the last batch norm that both pass, and behind a ReLU they do so for positive
    relations alone. 1 where there is no batch norm on the way.
    """
    first_call = {call.module: number for number, call in reversed([*enumerate(group.network.calls)])}
    passed = [
        place
        for place in group.followers
        if weights.batch_norm_scale(place.module) is not None
        and first_call[place.module] < first_call.get(reader.module, -1)
    ]
    if not passed:
        return np.ones(group.width)
    norm = max(passed, key=lambda place: first_call[place.module])
    scale, mine = weights.batch_norm_scale(norm.module), norm.channel_of_index >= 0
    scale_C = np.bincount(norm.channel_of_index[mine], scale[mine], group.width)
    of_cluster_C = np.bincount(into_C, scale_C)[into_C] / _cluster_sizes_C(into_C)
    gains_C = np.divide(scale_C, of_cluster_C, out=np.ones(group.width), where=of_cluster_C != 0)
    return gains_C.clip(0, MAX_GAIN)


def _cluster_sizes_C(into_C: np.ndarray) -> np.ndarray:
    """int64 (C,): how many channels each one's cluster has."""
    return np.bincount(into_C)[into_C]
