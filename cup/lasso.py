"""The group lasso of PruneTrain (Lym et al., 2019, arXiv 1901.09290): a penalty that empties channels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cup.tracing.groups import ChannelGroup
from cup.tracing.layers import find_layer, weight_dim, weight_of


class GroupLasso:
    """The sum of the Euclidean norms of all channels' weights, each layer's own.

    For each conv and linear layer that writes a group: the norms of its filters, what writes one channel together; for
    each that reads it: the norms of its columns, what reads one channel together. So a layer between two groups counts
    twice, as in the paper; norms, biases and depthwise convolutions do not count, as in the released code.
    """

    def __init__(self, groups: Sequence[ChannelGroup]) -> None:
        """groups: those whose channels may go. Valid until the next resize."""
        self._axes = [
            _Axis(place.module, place.axis, _blocks(place.channel_of_index, group.width))
            for group in groups
            for place in (*group.producers, *group.consumers)
        ]

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """A scalar with a gradient, which is zero for a channel whose weights are all zero."""
        return torch.stack([axis.norms(model).sum() for axis in self._axes]).sum()


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis of a layer. blocks: int64 (channels, n), each channel's indices; None where they are its channels."""

    module: str
    name: str
    blocks: torch.Tensor | None

    def norms(self, model: nn.Module) -> torch.Tensor:
        """(channels,). `vector_norm`, and not the root of a sum, has a gradient at zero."""
        layer = find_layer(model, self.module)
        rows = weight_of(layer).movedim(weight_dim(layer, self.name), 0).flatten(1)
        if self.blocks is not None:
            rows = rows[self.blocks.to(rows.device)].flatten(1)
        return torch.linalg.vector_norm(rows, dim=1)


def _blocks(channel_of_index: np.ndarray, width: int) -> torch.Tensor | None:
    if np.array_equal(channel_of_index, np.arange(width)):
        return None
    mine = np.flatnonzero(channel_of_index >= 0)
    order = mine[np.argsort(channel_of_index[mine], kind="stable")]
    return torch.from_numpy(order.reshape(width, -1))
