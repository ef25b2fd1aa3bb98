"""Filter features: one row a channel, one number for each incoming and each outgoing connection (paper, step 1).

Shape suffixes: C channels of the group, X connections of one layer, O rows and I columns of a weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg.blas import dsyrk

from cup.criteria.weights import Weights
from cup.tracing.groups import ChannelGroup, Masks, Place

FeatureVariant = Literal["both", "incoming", "outgoing"]

CHUNK = 4096
"""Connections that are brought to float64 at a time, so that a large linear layer is never copied whole."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Inner products of the channels' centred features, and squared norms of the features as they are.

    products_CC: the upper triangle and the diagonal; zeros below.
    """

    products_CC: np.ndarray
    squares_C: np.ndarray

    @staticmethod
    def empty(channels: int) -> "Gram":
        """Of no features at all."""
        return Gram(np.zeros((channels, channels)), np.zeros(channels))

    def copy(self) -> "Gram":
        return Gram(self.products_CC.copy(), self.squares_C.copy())


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
        nothing = [np.zeros(block.rows_CX.shape[1], dtype=bool) for block in self._blocks]
        self._known = [_Known(nothing, Gram.empty(group.width))]

    def rows(self, masks: Masks | None = None) -> np.ndarray:
        """float64 (C, F): all features of the group's channels.

        masks: from `keep_masks`, the connections to channels that are already gone and count no more.
        """
        columns = [block.rows_CX[:, block.stays(masks)] for block in self._blocks]
        return np.concatenate([np.empty((self._width, 0)), *columns], axis=1, dtype=np.float64)

    def gram(self, masks: Masks | None = None) -> Gram:
        """Products of the rows under these masks: the same object as the last time where these change nothing.

        Made from those of no connection, of the first masks or of the last ones, whichever differ by the fewest.
        """
        stays = [block.stays(masks) for block in self._blocks]
        base = min(reversed(self._known), key=lambda known: known.difference(stays))
        if base.difference(stays) == 0:
            return base.gram
        gram = base.gram.copy()
        for block, before, now in zip(self._blocks, base.stays, stays, strict=True):
            add_products(gram, block.rows_CX, now & ~before)
            add_products(gram, block.rows_CX, before & ~now, sign=-1)
        self._known[2:] = [_Known(stays, gram)]  # the first masks leave the most, and stay
        return gram


@dataclass(frozen=True, eq=False)
class _Known:
    """Products, and of each block the connections that they were made from."""

    stays: list[np.ndarray]
    gram: Gram

    def difference(self, stays: list[np.ndarray]) -> int:
        """How many connections are in only one of both."""
        return sum(int((one != other).sum()) for one, other in zip(self.stays, stays, strict=True))


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


def add_products(gram: Gram, rows_CX: np.ndarray, columns: np.ndarray, sign: int = 1) -> None:
    """Add what these columns contribute, in float64 and in place; with sign -1 take it away.

    The rows are centred first: |a|² + |b|² - 2ab would cancel digits otherwise.
    columns: bool (X,).
    """
    every = columns.all()
    indices, squares_C = np.flatnonzero(columns), gram.squares_C
    for start in range(0, len(indices), CHUNK):
        chunk = slice(start, start + CHUNK)
        chunk_CX = rows_CX[:, chunk if every else indices[chunk]].astype(np.float64)
        squares_C += sign * np.einsum("cx,cx->c", chunk_CX, chunk_CX)
        chunk_CX -= chunk_CX.mean(axis=0)
        # BLAS sees the transposed: it is told of the lower triangle, and that is the upper one here.
        by_column = chunk_CX.flags.f_contiguous
        values = chunk_CX if by_column else chunk_CX.T
        dsyrk(sign, values, 1.0, gram.products_CC.T, trans=not by_column, lower=1, overwrite_c=1)


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
