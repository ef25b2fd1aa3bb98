"""A model's weights as read-only arrays.

Shape suffixes: O rows and I columns of a weight, K its kernel window (one dimension or more, or none).
"""

import numpy as np
import torch
from torch import nn

from cup.errors import CupError
from cup.tracing.layers import CONVS, bias_of, find_layer, weight_dim, weight_of

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Weights:
    """Reads conv, linear and batch-norm layers. The arrays may share memory with the model, so they cannot be written.

    Layers by dotted name; half precision is read as float32, other types keep their own.
    All methods raise CupError naming the layer whose numbers are not finite.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._connections: dict[str, np.ndarray] = {}
        self._filters: dict[str, np.ndarray] = {}

    def is_conv(self, name: str) -> bool:
        return isinstance(find_layer(self._model, name), CONVS)

    def is_linear(self, name: str) -> bool:
        return isinstance(find_layer(self._model, name), nn.Linear | nn.MultiheadAttention)

    def filters(self, name: str) -> np.ndarray:
        """(O, I, ...): a layer's weight, what it writes first, also for a transposed convolution."""
        if name not in self._filters:
            self._filters[name] = self._finished(name, self._read(name).numpy())
        return self._filters[name]

    def connections(self, name: str) -> np.ndarray:
        """(O, I): a linear layer's weight with its signs, a convolution's Frobenius norms over the kernel window."""
        if name not in self._connections:
            self._connections[name] = self._finished(name, _window_norms(self._read(name)))
        return self._connections[name]

    def bias(self, name: str) -> np.ndarray | None:
        """float64 (O,), None for a layer without."""
        bias = bias_of(find_layer(self._model, name))
        return None if bias is None else self._finished(name, bias.detach().double().cpu().numpy())

    def batch_norm_scale(self, name: str) -> np.ndarray | None:
        """float64 (O,): a batch norm's factors; None for any other layer, and for a batch norm without them."""
        layer = find_layer(self._model, name)
        if not isinstance(layer, _BATCH_NORMS) or layer.weight is None:
            return None
        return self._finished(name, layer.weight.detach().double().cpu().numpy())

    def _read(self, name: str) -> torch.Tensor:
        layer = find_layer(self._model, name)
        weight = weight_of(layer).detach().movedim(weight_dim(layer, "out"), 0).cpu()
        return weight if weight.dtype == torch.float64 else weight.float()

    def _finished(self, name: str, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise CupError(f"the weights of {name} hold NaN or infinite values: no plan can be made from them")
        values.setflags(write=False)
        return values


def _window_norms(weight_OIK: torch.Tensor) -> np.ndarray:
    """(O, I); float64 where a norm is taken."""
    if weight_OIK.dim() == 2:
        return weight_OIK.numpy()
    if weight_OIK[0, 0].numel() == 1:
        return weight_OIK.flatten(1).abs().numpy()
    squares_OIK = weight_OIK.to(torch.float64, copy=True).square_()  # in place on a copy: wide layers are large
    return squares_OIK.sum(tuple(range(2, weight_OIK.dim()))).sqrt_().numpy()
