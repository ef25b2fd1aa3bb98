"""COP: filters that correlate with others go, weighed against what their layers cost (Wang et al., arXiv 1906.10337).

Shape suffixes: C channels of a group, G groups, O outputs of a layer, N weights that one channel has for one output,
T the three largest entries of a column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cup.criteria.ranking import Ranking
from cup.criteria.view import View
from cup.criteria.weights import Weights
from cup.errors import CupError
from cup.tracing.groups import ChannelGroup, Masks, Place, prunable_groups

TOP = 3
"""How many of a filter's largest correlations tell how redundant it is."""


@dataclass(frozen=True)
class Cop:
    """The globally least important filter goes first, again and again; of equals the first group's highest id.

    The importance of filter i in layer l is (1 - r_i) + (1 - log2 C_l / max log2 C) + (1 - log2 P_l / max log2 P). r_i
    is the mean of its three largest correlations with other filters of the layer; C_l and P_l are FLOPs (2 per
    multiply-add) and parameters of all layers that write or read the channels, at the widths of that moment. A filter
    that has gone correlates with none.

    Heights are shares: once a channel goes, so many of all prunable channels are gone. A cut at height 0.3 so removes
    30% of them, as the authors' program does. All groups in scope are ranked together, so masks change nothing.
    scope: as of `PlanOptions`.
    """

    scope: Literal["inner", "all"] = "inner"

    def rank(self, group: ChannelGroup, view: View, masks: Masks) -> Ranking:
        """Raises CupError for a group that is not in scope, and where nothing reads one that is."""
        rankings = view.remember(self, lambda: _rank_together(view, prunable_groups(view.groups, self.scope)))
        if group.name not in rankings:
            raise CupError(f"criterion cop: {group.name} is not among the groups in scope {self.scope!r}")
        return rankings[group.name]


def correlations(weights: Weights, group: ChannelGroup) -> np.ndarray:
    """float64 (C, C): how alike the channels are to the layers that read them, from 0 to 1, 0 on the diagonal.

    For each place in the kernel window (each entry of a channel's block of columns behind a flatten) the absolute
    Pearson correlation of two channels' weights over all outputs; the mean over the places; divided by the largest one.
    Raises CupError where nothing reads the group.
    """
    sum_CC, places = np.zeros((group.width, group.width)), 0
    for place in group.consumers:
        rows_CNO = _outgoing(weights.filters(place.module), place, group.width)
        for at in range(rows_CNO.shape[1]):
            rows_CO = rows_CNO[:, at].astype(np.float64)
            rows_CO -= rows_CO.mean(axis=1, keepdims=True)
            norms_C = np.linalg.norm(rows_CO, axis=1, keepdims=True)
            rows_CO /= np.where(norms_C > 0, norms_C, 1)  # weights that are all equal correlate with none
            sum_CC += np.abs(rows_CO @ rows_CO.T)
        places += rows_CNO.shape[1]
    if not places:
        raise CupError(f"criterion cop: nothing reads {group.name}, so its channels have no weights to compare")
    np.fill_diagonal(sum_CC, 0)
    return sum_CC / (sum_CC.max() or 1)


def _outgoing(filters: np.ndarray, place: Place, width: int) -> np.ndarray:
    """(C, N, O): the weights by which a layer reads each channel."""
    mine = np.flatnonzero(place.channel_of_index >= 0)
    order = mine[np.argsort(place.channel_of_index[mine], kind="stable")]
    by_channel = np.moveaxis(filters.take(order, axis=1), 0, -1)
    return by_channel.reshape(width, -1, len(filters))


def _rank_together(view: View, groups: Sequence[ChannelGroup]) -> dict[str, Ranking]:
    total = sum(group.width for group in groups)
    layers = [_Filters(correlations(view.weights, group)) for group in groups]
    costs = _Costs(view, groups)
    highest_G = np.array([filters.highest for filters in layers])
    order: list[list[int]] = [[] for _ in groups]
    shares: list[list[float]] = [[] for _ in groups]
    for gone in range(1, total - len(groups) + 1):
        at = int(np.argmin(costs.terms() - highest_G))
        channel = layers[at].remove_most_redundant()
        highest_G[at] = layers[at].highest
        costs.remove(at, channel)
        order[at].append(channel)
        shares[at].append(gone / total)
    return {
        group.name: Ranking(np.array([*order[at], layers[at].last]), np.array(shares[at], dtype=np.float64))
        for at, group in enumerate(groups)
    }


class _Filters:
    """The filters of one group that are left, and how redundant each is."""

    def __init__(self, correlations_CC: np.ndarray) -> None:
        width = len(correlations_CC)
        missing = max(0, TOP - width)
        self._alike = np.pad(correlations_CC, ((0, missing), (0, 0)))
        self._left = width
        self._largest_TC = np.zeros((TOP, width), dtype=np.int64)
        self._redundancy_C = np.zeros(width)
        self._look_at(np.arange(width))

    @property
    def highest(self) -> float:
        """The redundancy of the filter that goes next; minus infinity where only one is left."""
        return float(self._redundancy_C.max()) if self._left > 1 else -np.inf

    @property
    def last(self) -> int:
        """The filter that stays for all."""
        return int(np.argmax(self._redundancy_C))

    def remove_most_redundant(self) -> int:
        channel = int(np.flatnonzero(self._redundancy_C == self._redundancy_C.max())[-1])
        self._alike[channel] = 0
        self._left -= 1
        self._look_at(np.flatnonzero((self._largest_TC == channel).any(axis=0)))
        self._redundancy_C[channel] = -np.inf
        return channel

    def _look_at(self, channels: np.ndarray) -> None:
        """Compute the redundancy of these filters anew."""
        columns = self._alike[:, channels]
        largest = np.argpartition(columns, -TOP, axis=0)[-TOP:]
        self._largest_TC[:, channels] = largest
        means = np.take_along_axis(columns, largest, axis=0).mean(axis=0)
        self._redundancy_C[channels] = np.where(np.isneginf(self._redundancy_C[channels]), -np.inf, means)


class _Costs:
    """FLOPs and parameters of each group's layers, at the widths of the moment."""

    def __init__(self, view: View, groups: Sequence[ChannelGroup]) -> None:
        self._groups = groups
        names = {place.module for group in groups for place in (*group.producers, *group.consumers)}
        macs = {layer.name: layer.macs for layer in view.now.layers}
        self._layers = {name: _LayerAtWidths(view, name, macs.get(name, 0)) for name in names}
        self._of_group = [
            list(dict.fromkeys(place.module for place in (*group.producers, *group.consumers))) for group in groups
        ]
        self._touched = [
            [other for other, theirs in enumerate(self._of_group) if set(own) & set(theirs)] for own in self._of_group
        ]
        self._flops_G, self._params_G = np.zeros(len(groups)), np.zeros(len(groups))
        for at in range(len(groups)):
            self._add_up(at)

    def terms(self) -> np.ndarray:
        """(G,): the part of the importance that all filters of a group share."""
        flops_G, params_G = np.log2(self._flops_G), np.log2(self._params_G)
        return 3 - flops_G / (flops_G.max() or 1) - params_G / (params_G.max() or 1)

    def remove(self, at: int, channel: int) -> None:
        """Take a channel of a group out of all its layers."""
        for place in (*self._groups[at].producers, *self._groups[at].consumers):
            self._layers[place.module].left[place.axis] -= int((place.channel_of_index == channel).sum())
        for other in self._touched[at]:
            self._add_up(other)

    def _add_up(self, at: int) -> None:
        layers = [self._layers[name] for name in self._of_group[at]]
        self._flops_G[at] = max(1, sum(layer.flops for layer in layers))
        self._params_G[at] = max(1, sum(layer.params for layer in layers))


class _LayerAtWidths:
    """What one layer costs with `left` channels on its axes."""

    def __init__(self, view: View, name: str, macs: int) -> None:
        filters, bias = view.weights.filters(name), view.weights.bias(name)
        self.left = {"out": filters.shape[0], "in": filters.shape[1]}
        self._weights_a_pair = filters[0, 0].size
        self._flops_a_pair = 2 * macs / (filters.shape[0] * filters.shape[1])
        self._has_bias = bias is not None

    @property
    def flops(self) -> float:
        return self._flops_a_pair * self.left["out"] * self.left["in"]

    @property
    def params(self) -> int:
        return self._weights_a_pair * self.left["out"] * self.left["in"] + self._has_bias * self.left["out"]
