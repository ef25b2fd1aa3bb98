"""Filter features: one row a channel, one number for each incoming and each outgoing connection (paper, step 1).

Shape suffixes: C channels of the group, X connections of one layer, O rows and I columns of a weight.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from cup.criteria.cluster import ward_tree
from cup.errors import CupError
from cup.tracing.groups import ChannelGroup, Masks, Place
from cup.tracing.layers import CONVS, find_layer, weight_dim

FeatureVariant = Literal["both", "incoming", "outgoing"]

CHUNK = 4096
"""Connections that are brought to float64 at a time, so that a large linear layer is never copied whole."""


class Features:
    """The features of every channel of the given groups, read from the model once.

    g(W_in[i]), bias_i and g(W_out[:, i]) of channel i, over all layers that write or read the group: g is the
    Frobenius norm over the kernel window, over a channel's block of columns behind a flatten, and over the filters
    that a grouped convolution binds together; a linear layer that reads linear layers contributes its signed weights.
    Grouped and depthwise convolutions count among the layers that write.

    Raises CupError naming the layer whose weights are not finite.
    """

    def __init__(
        self, model: nn.Module, groups: Iterable[ChannelGroup], variant: FeatureVariant = "both", use_bias: bool = True
    ) -> None:
        weights = _Weights(model)
        self._blocks = {group.name: list(_blocks(weights, group, variant, use_bias)) for group in groups}
        self._grams: dict[tuple[str, int], _Gram] = {}
        self._dendrograms: dict[str, Dendrogram] = {}

    def rows(self, group: ChannelGroup, masks: Masks | None = None) -> np.ndarray:
        """float64 (C, F): all features of the group's channels.

        masks: from `keep_masks`, the connections to channels that are already gone and count no more.
        """
        columns = [block.rows_CX[:, block.stays(masks)] for block in self._blocks[group.name]]
        return np.concatenate([np.empty((group.width, 0)), *columns], axis=1, dtype=np.float64)

    def dendrogram(self, group: ChannelGroup, masks: Masks | None = None) -> "Dendrogram":
        """Ward's tree over the group's channels. What a change of masks leaves as it was is not computed again."""
        changed = [self._update(group, index, block, masks) for index, block in enumerate(self._blocks[group.name])]
        if any(changed) or group.name not in self._dendrograms:
            grams = [self._grams[group.name, index] for index in range(len(changed))]
            products_CC, squares_C = np.zeros((group.width, group.width)), np.zeros(group.width)
            for gram in grams:
                products_CC += gram.products_CC
                squares_C += gram.squares_C
            self._dendrograms[group.name] = Dendrogram(ward_tree(products_CC), squares_C)
        return self._dendrograms[group.name]

    def _update(self, group: ChannelGroup, index: int, block: "_Block", masks: Masks | None) -> bool:
        """Bring one block's products in line with the masks; returns whether they had to change."""
        stays, known = block.stays(masks), self._grams.get((group.name, index))
        if known is not None and np.array_equal(known.stays, stays):
            return False
        self._grams[group.name, index] = _gram(block.rows_CX, stays)
        return True


@dataclass(frozen=True, eq=False)
class Dendrogram:
    """A group's tree (SciPy's linkage matrix) and the squared norms of its channels' features, float64 (C,)."""

    tree: np.ndarray
    squares_C: np.ndarray


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
class _Gram:
    """Of one block: inner products of the centred rows, and squared norms of the rows as they are."""

    stays: np.ndarray
    products_CC: np.ndarray
    squares_C: np.ndarray


def _gram(rows_CX: np.ndarray, stays: np.ndarray) -> _Gram:
    """The rows are centred, so that distances lose no digits as the difference of squares."""
    count = len(rows_CX)
    products_CC, squares_C = np.zeros((count, count)), np.zeros(count)
    for start in range(0, len(stays), CHUNK):
        chunk_CX, chunk_stays = rows_CX[:, start : start + CHUNK], stays[start : start + CHUNK]
        chunk_CX = (chunk_CX if chunk_stays.all() else chunk_CX[:, chunk_stays]).astype(np.float64)
        squares_C += np.einsum("cx,cx->c", chunk_CX, chunk_CX)
        chunk_CX -= chunk_CX.mean(axis=0)
        products_CC += chunk_CX @ chunk_CX.T
    return _Gram(stays, products_CC, squares_C)


def _blocks(weights: "_Weights", group: ChannelGroup, variant: FeatureVariant, use_bias: bool) -> Iterator[_Block]:
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


class _Weights:
    """Reads each layer once: kernel windows become their norms, linear weights stay as they are."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._connections: dict[str, np.ndarray] = {}

    def is_conv(self, name: str) -> bool:
        return isinstance(find_layer(self._model, name), CONVS)

    def is_linear(self, name: str) -> bool:
        return isinstance(find_layer(self._model, name), nn.Linear)

    def connections(self, name: str) -> np.ndarray:
        """(O, I) of one conv or linear layer."""
        if name not in self._connections:
            layer = find_layer(self._model, name)
            weight = layer.weight.detach().movedim(weight_dim(layer, "out"), 0).cpu()
            self._connections[name] = self._finite(name, _window_norms(weight))
        return self._connections[name]

    def bias(self, name: str) -> np.ndarray | None:
        bias = find_layer(self._model, name).bias
        return None if bias is None else self._finite(name, bias.detach().double().cpu().numpy())

    def _finite(self, name: str, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise CupError(f"the weights of {name} hold NaN or infinite values: no plan can be made from them")
        return values


def _window_norms(weight: torch.Tensor) -> np.ndarray:
    """(O, I) from a weight (O, I, ...) on the CPU; float64 where a norm is taken."""
    if weight.dtype != torch.float64:
        weight = weight.float()
    if weight.dim() == 2:
        return weight.numpy()
    if weight[0, 0].numel() == 1:
        return weight.flatten(1).abs().numpy()
    return weight.double().square_().sum(tuple(range(2, weight.dim()))).sqrt_().numpy()
