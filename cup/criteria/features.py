"""Filter features: one row a channel, one number for each incoming and each outgoing connection (paper, step 1).

Shape suffixes: C channels of the group, X connections of one layer, O rows and I columns of a weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cup.criteria.weights import Weights
from cup.tracing.groups import ChannelGroup, Masks, Place

FeatureVariant = Literal["both", "incoming", "outgoing"]

CHUNK = 4096
"""Connections that are brought to float64 at a time, so that a large linear layer is never copied whole."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Inner products of the channels' centred features, and squared norms of the features as they are."""

    products_CC: np.ndarray
    squares_C: np.ndarray


class GroupFeatures:
    """The features of every channel of one group.

    g(W_in[i]), bias_i and g(W_out[:, i]) of channel i, over all layers that write or read the group: g is the
    Frobenius norm over the kernel window, over a channel's block of columns behind a flatten, and over the filters
    that a grouped convolution binds together; a linear layer that reads linear layers contributes its signed weights.
    Grouped and depthwise convolutions count among the layers that write.

    Raises CupError naming the layer whose weights are not finite.
    """

    def __init__(
        self, weights: Weights, group: ChannelGroup, variant: FeatureVariant = "both", use_bias: bool = True
    ) -> None:
        self._width = group.width
        self._blocks = list(_blocks(weights, group, variant, use_bias))
        self._block_grams: dict[int, _BlockGram] = {}
        self._gram: Gram | None = None

    def rows(self, masks: Masks | None = None) -> np.ndarray:
        """float64 (C, F): all features of the group's channels.

        masks: from `keep_masks`, the connections to channels that are already gone and count no more.
        """
        columns = [block.rows_CX[:, block.stays(masks)] for block in self._blocks]
        return np.concatenate([np.empty((self._width, 0)), *columns], axis=1, dtype=np.float64)

    def gram(self, masks: Masks | None = None) -> Gram:
        """Products of the rows under these masks. Blocks whose mask is unchanged are cached."""
        changed = [self._update(index, block, masks) for index, block in enumerate(self._blocks)]
        if any(changed) or self._gram is None:
            products_CC, squares_C = np.zeros((self._width, self._width)), np.zeros(self._width)
            for index in range(len(self._blocks)):
                products_CC += self._block_grams[index].gram.products_CC
                squares_C += self._block_grams[index].gram.squares_C
            self._gram = Gram(products_CC, squares_C)
        return self._gram

    def _update(self, index: int, block: "_Block", masks: Masks | None) -> bool:
        """Bring one block's products in line with the masks; returns whether they had to change."""
        stays, known = block.stays(masks), self._block_grams.get(index)
        if known is not None and np.array_equal(known.stays, stays):
            return False
        self._block_grams[index] = _BlockGram(stays, gram_of(block.rows_CX, stays))
        return True


@dataclass(frozen=True, eq=False)
class _Block:
    """The features that one layer contributes: a row a channel, in the weights' own precision.

    layer, axis: the axis of the layer that the columns stand for; channels of another group that can go.
    """

    rows_CX: np.ndarray
    layer: str
    axis: Literal["in", "out"]

    def stays(self, masks: Masks | None) -> np.ndarray:
        """bool (X,): the connections that are still there."""
        everything = np.ones(self.rows_CX.shape[1], dtype=bool)
        return everything if masks is None else masks.get((self.layer, self.axis), everything)


@dataclass(frozen=True, eq=False)
class _BlockGram:
    """One block's share, and the connections that it was computed from."""

    stays: np.ndarray
    gram: Gram


def gram_of(rows_CX: np.ndarray, stays: np.ndarray) -> Gram:
    """Products of the columns that stay, in float64.

    The rows are centred first: |a|² + |b|² - 2ab would cancel digits otherwise.
    """
    count = len(rows_CX)
    products_CC, squares_C = np.zeros((count, count)), np.zeros(count)
    for start in range(0, len(stays), CHUNK):
        chunk_CX, chunk_stays = rows_CX[:, start : start + CHUNK], stays[start : start + CHUNK]
        chunk_CX = (chunk_CX if chunk_stays.all() else chunk_CX[:, chunk_stays]).astype(np.float64)
        squares_C += np.einsum("cx,cx->c", chunk_CX, chunk_CX)
        chunk_CX -= chunk_CX.mean(axis=0)
        products_CC += chunk_CX @ chunk_CX.T
    return Gram(products_CC, squares_C)


def _blocks(weights: Weights, group: ChannelGroup, variant: FeatureVariant, use_bias: bool) -> Iterator[_Block]:
    written_by = [*group.producers, *(place for place in group.followers if weights.is_conv(place.module))]
    for place in written_by:
        if variant != "outgoing":
            yield _Block(_by_channel(weights.connections(place.module), place, group.width), place.module, "in")
        bias_O = weights.bias(place.module)
        if use_bias and bias_O is not None:
            yield _Block(_by_channel(bias_O[:, None], place, group.width), "", "in")
    if variant != "incoming":
        signed = all(weights.is_linear(place.module) for place in group.producers)
        for place in group.consumers:
            columns_IO = weights.connections(place.module).T
            rows_CX = _by_channel(columns_IO, place, group.width)
            unsigned = weights.is_linear(place.module) and not signed
            yield _Block(np.abs(rows_CX) if unsigned else rows_CX, place.module, "out")


def _by_channel(entries_RX: np.ndarray, place: Place, width: int) -> np.ndarray:
    """(C, X): the entries of each channel's index on the place's axis, their norm where it has several."""
    mine = np.flatnonzero(place.channel_of_index >= 0)
    order = mine[np.argsort(place.channel_of_index[mine], kind="stable")]
    if len(order) == width:
        in_order = len(order) == len(entries_RX) and (order[1:] > order[:-1]).all()
        return entries_RX if in_order else entries_RX[order]
    starts = np.searchsorted(place.channel_of_index[order], np.arange(width))
    rows_CX = np.empty((width, entries_RX.shape[1]))
    for first in range(0, entries_RX.shape[1], CHUNK):
        chunk_RX = entries_RX[order, first : first + CHUNK].astype(np.float64)
        rows_CX[:, first : first + CHUNK] = np.sqrt(np.add.reduceat(chunk_RX**2, starts, axis=0))
    return rows_CX
