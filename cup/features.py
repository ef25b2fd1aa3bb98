"""Filter features: one row a channel, one number for each incoming and each outgoing connection (paper, step 1).

Shape suffixes: C channels of the group, F features, O rows and I columns of a weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from cup.errors import CupError
from cup.groups import AxisName, ChannelGroup, Place

FeatureVariant = Literal["both", "incoming", "outgoing"]
Masks = dict[tuple[str, AxisName], np.ndarray]


@dataclass(frozen=True, eq=False)
class Connections:
    """What features need of one conv or linear layer; computed once, used for every cut that is tried.

    weight_OI: float64, the Frobenius norm over the kernel window, or a linear layer's signed weights.
    bias_O: float64, or None for a layer without a bias.
    is_linear: whether the weights are signed.
    """

    weight_OI: np.ndarray
    bias_O: np.ndarray | None
    is_linear: bool


def connections(model: nn.Module, groups: Iterable[ChannelGroup]) -> dict[str, Connections]:
    """Module name -> its connections, for every layer that writes or reads one of the groups.

    Raises CupError naming the layer whose weights are not finite.
    """
    places = {place.module for group in groups for place in (*group.producers, *group.consumers)}
    return {name: _layer_connections(name, model.get_submodule(name)) for name in sorted(places)}


def group_features(
    layers: dict[str, Connections],
    group: ChannelGroup,
    variant: FeatureVariant = "both",
    use_bias: bool = True,
    masks: Masks | None = None,
) -> np.ndarray:
    """float64 (C, F): [ g(W_in[i]), bias_i, g(W_out[:, i]) ] of every channel i, over all producers and consumers.

    g is the Frobenius norm over the kernel window, and over a channel's block of columns behind a flatten; a linear
    layer that reads a linear layer contributes its signed weights.
    layers: from `connections`.
    masks: from `keep_masks`, the connections to channels that are already gone and count no more.
    """
    masks = masks or {}
    columns = [np.empty((group.width, 0))]
    for place in group.producers:
        if variant != "outgoing":
            columns.append(_incoming(layers[place.module], place, masks))
        bias_O = layers[place.module].bias_O
        if use_bias and bias_O is not None:
            columns.append(bias_O[_rows(place)][:, None])
    if variant != "incoming":
        signed = all(layers[place.module].is_linear for place in group.producers)
        columns.extend(_outgoing(layers[place.module], place, group.width, signed, masks) for place in group.consumers)
    return np.concatenate(columns, axis=1)


def _layer_connections(name: str, layer: nn.Module) -> Connections:
    weight = layer.weight.detach().float()
    weight_OI = weight if weight.dim() == 2 else torch.linalg.vector_norm(weight.flatten(2), dim=2, dtype=torch.float64)
    found = Connections(
        weight_OI=weight_OI.double().cpu().numpy(),
        bias_O=None if layer.bias is None else layer.bias.detach().double().cpu().numpy(),
        is_linear=isinstance(layer, nn.Linear),
    )
    if not np.isfinite(found.weight_OI).all() or (found.bias_O is not None and not np.isfinite(found.bias_O).all()):
        raise CupError(f"the weights of {name} hold NaN or infinite values: no plan can be made from them")
    return found


def _incoming(layer: Connections, place: Place, masks: Masks) -> np.ndarray:
    stays_I = masks.get((place.module, "in"), slice(None))
    return layer.weight_OI[_rows(place)][:, stays_I]


def _outgoing(layer: Connections, place: Place, width: int, signed: bool, masks: Masks) -> np.ndarray:
    stays_O = masks.get((place.module, "out"), slice(None))
    # Columns in the order of their channel; each channel owns equally many of them (1, or a block behind a flatten).
    mine = np.flatnonzero(place.channel_of_index >= 0)
    order = mine[np.argsort(place.channel_of_index[mine], kind="stable")]
    weight_OI = layer.weight_OI[stays_O][:, order]
    if signed and len(order) == width:
        return weight_OI.T
    return np.linalg.norm(weight_OI.reshape(len(weight_OI), width, -1), axis=2).T


def _rows(place: Place) -> np.ndarray:
    """The producer's row of each channel, in channel order."""
    return np.argsort(place.channel_of_index, kind="stable")
