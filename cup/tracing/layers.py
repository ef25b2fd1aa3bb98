"""Layers as surgery sees them: which dimension of a weight carries which channels, and which attributes say so."""

from typing import Literal

import torch
from torch import nn

from cup.errors import CupError
from cup.tracing.heads import head_count, set_head_count, spell_out

AxisName = Literal["in", "out"]

TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED_CONVS)


def find_layer(model: nn.Module, name: str) -> nn.Module | torch.Tensor:
    """The module, or the free parameter or buffer, with this dotted name. CupError where the model has none."""
    owner, _, attribute = name.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), attribute) if name else model
    except AttributeError as error:
        raise CupError(f"these groups are another network's: no layer {name}") from error


def tensor_names(layer: nn.Module) -> tuple[str, str]:
    """What the layer calls its weight and its bias. torch's attention projects to query, key and value with them."""
    return ("in_proj_weight", "in_proj_bias") if isinstance(layer, nn.MultiheadAttention) else ("weight", "bias")


def weight_of(layer: nn.Module | torch.Tensor) -> torch.Tensor | None:
    """The tensor with the layer's channels; None for a norm without weights, and for a module that counts heads."""
    return layer if isinstance(layer, torch.Tensor) else getattr(layer, tensor_names(layer)[0], None)


def bias_of(layer: nn.Module | torch.Tensor) -> torch.Tensor | None:
    return None if isinstance(layer, torch.Tensor) else getattr(layer, tensor_names(layer)[1], None)


def only_counts_heads(layer: nn.Module | torch.Tensor) -> bool:
    """Whether it is a module whose "out" axis are heads that other layers write. torch's own has their weights."""
    is_module = isinstance(layer, nn.Module) and not isinstance(layer, nn.MultiheadAttention)
    return is_module and head_count(layer) is not None


def pads_channels(layer: nn.Module | torch.Tensor) -> bool:
    """Whether it is a module that can pad images with as many zero channels in front as behind: nn.ZeroPad3d((0, 0, 0,
    0, n, n)). Its "out" axis are the zero channels, those in front first; a cut may have left none.
    """
    if type(layer) not in (nn.ZeroPad3d, nn.ConstantPad3d) or layer.value != 0:
        return False
    *around, before, after = layer.padding
    return not any(around) and before == after >= 0


def has_no_tensors(layer: nn.Module | torch.Tensor) -> bool:
    """Whether the widths of the module are its attributes alone."""
    return only_counts_heads(layer) or pads_channels(layer)


def weight_dim(layer: nn.Module | torch.Tensor, axis: AxisName) -> int:
    """The dimension of the weight that carries the channels written ("out") or read ("in")."""
    if isinstance(layer, torch.Tensor):
        return max(range(layer.dim()), key=lambda dim: layer.shape[dim])  # its other dimensions have length one
    if isinstance(layer, TRANSPOSED_CONVS):
        return {"in": 0, "out": 1}[axis]
    return {"out": 0, "in": 1}[axis]


def axis_length(layer: nn.Module | torch.Tensor, axis: AxisName) -> int | None:
    """Channels on an axis of the layer, by its own attributes; None for what is no layer with such an axis."""
    if isinstance(layer, torch.Tensor):
        return max(layer.shape) if axis == "out" else None
    if isinstance(layer, (*CONVS, nn.Linear)):
        written, read = (
            ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
        )
        return getattr(layer, written if axis == "out" else read)
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0]
    if isinstance(layer, nn.MultiheadAttention):
        return None if layer.in_proj_weight is None else layer.in_proj_weight.shape[weight_dim(layer, axis)]
    if only_counts_heads(layer):
        return head_count(layer) if axis == "out" else None
    if pads_channels(layer):
        return sum(layer.padding) if axis == "out" else None
    names = ("num_features", "num_channels", "num_parameters")
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None) if axis == "out" else None


def set_widths(layer: nn.Module, entries: int) -> None:
    """Bring a layer's attributes in line with its tensors after surgery.

    entries: of the "out" axis of a norm, grouped convolution or PReLU, heads, or zero channels; other layers' weights
        say it all.
    """
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, TRANSPOSED_CONVS):
        layer.in_channels, layer.out_channels = layer.weight.shape[:2]
    elif isinstance(layer, CONVS) and layer.groups == 1:
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    elif isinstance(layer, CONVS):
        layer.groups = entries * layer.groups // layer.out_channels
        layer.out_channels, layer.in_channels = entries, layer.groups * layer.weight.shape[1]
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = max(1, entries * layer.num_groups // layer.num_channels)
        layer.num_channels = entries
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (entries,)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = entries
    elif isinstance(layer, nn.MultiheadAttention):
        spell_out(layer)
    elif only_counts_heads(layer):
        set_head_count(layer, entries)
    elif pads_channels(layer):
        layer.padding = (0, 0, 0, 0, entries // 2, entries // 2)
    else:
        layer.num_features = entries
