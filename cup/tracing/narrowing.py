"""Take channels out of a model's layers: the tensors, and the attributes that say how wide a layer is."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cup.errors import CupError
from cup.tracing.groups import Masks
from cup.tracing.layers import AxisName, find_layer, set_widths, weight_dim


@dataclass(frozen=True, eq=False)
class ParameterChange:
    """What became of one parameter: new = old with the indices of each named axis selected.

    axes: dimension -> int64 kept indices, on the parameter's device.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    axes: Mapping[int, torch.Tensor]


def narrow_layers(model: nn.Module, masks: Masks) -> tuple[ParameterChange, ...]:
    """Keep of every axis only what the masks say, in place.

    Raises CupError, with the model left as it was, where a layer cannot be narrowed.
    """
    indices: dict[str, dict[AxisName, torch.Tensor]] = {}
    for (module, axis), mask in masks.items():
        indices.setdefault(module, {})[axis] = torch.from_numpy(mask.nonzero()[0])
    renewed: dict[int, nn.Parameter] = {}
    narrowed = [
        _narrowed(model, name, axes, renewed) for name, axes in indices.items()
    ]  # all before any of it is installed
    for layer in narrowed:
        _install(model, layer)
    return tuple(change for layer in narrowed for change in layer.changes)


def select(tensor: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A new tensor with the given indices of each named dimension, in the memory format of the old one."""
    with torch.no_grad():
        narrowed = tensor.detach()
        for dim, index in axes.items():
            narrowed = narrowed.index_select(dim, index.to(tensor.device))
        # Not .contiguous(): for a 1x1 kernel any order of the strides counts as contiguous, and would get lost.
        return torch.empty_like(narrowed, memory_format=_memory_format(tensor)).copy_(narrowed)


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """The format whose strides the tensor has."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if channels_last is None:
        return torch.contiguous_format
    strides = torch.empty(tensor.shape, device="meta", memory_format=channels_last).stride()
    return channels_last if tensor.stride() == strides else torch.contiguous_format


@dataclass(frozen=True, eq=False)
class _NarrowedLayer:
    """New tensors of one layer, or the free parameter or buffer itself, not installed yet.

    buffers: dotted name -> tensor. entries: of its "out" axis, if that shrinks.
    """

    name: str
    changes: tuple[ParameterChange, ...]
    buffers: Mapping[str, torch.Tensor]
    entries: int = 0


def _narrowed(
    model: nn.Module, name: str, axes: Mapping[AxisName, torch.Tensor], renewed: dict[int, nn.Parameter]
) -> _NarrowedLayer:
    """The layer's tensors along its "out" axis, its "in" axis or both; the layer itself stays as it is.

    renewed: id of an old parameter -> its new one, so that tied weights stay tied; added to.
    """
    layer = find_layer(model, name)
    weight_axes = {weight_dim(layer, axis): index for axis, index in axes.items()}
    if isinstance(layer, nn.Parameter):
        return _NarrowedLayer(name, (_change(model, name, weight_axes, renewed),), {})
    if isinstance(layer, torch.Tensor):
        return _NarrowedLayer(name, (), {name: select(layer, weight_axes)})
    changes = [_change(model, f"{name}.weight", weight_axes, renewed)] if layer.weight is not None else []
    if "out" not in axes:
        return _NarrowedLayer(name, tuple(changes), {})
    entries = {0: axes["out"]}
    if getattr(layer, "bias", None) is not None:
        changes.append(_change(model, f"{name}.bias", entries, renewed))
    statistics = {key: getattr(layer, key, None) for key in ("running_mean", "running_var")}
    buffers = {f"{name}.{key}": select(value, entries) for key, value in statistics.items() if value is not None}
    return _NarrowedLayer(name, tuple(changes), buffers, len(axes["out"]))


def _change(
    model: nn.Module, name: str, axes: Mapping[int, torch.Tensor], renewed: dict[int, nn.Parameter]
) -> ParameterChange:
    name = name.removeprefix(".")  # of a network that is one layer
    try:
        old = model.get_parameter(name)
    except AttributeError as error:
        raise CupError(
            f"{name} is computed from other parameters, by a mask or a parametrization: trace again"
        ) from error
    if id(old) not in renewed:
        renewed[id(old)] = _renew(old, axes)
    return ParameterChange(name, old, renewed[id(old)], dict(axes))


def _renew(old: nn.Parameter, axes: Mapping[int, torch.Tensor]) -> nn.Parameter:
    new = nn.Parameter(select(old, axes), requires_grad=old.requires_grad)
    vars(new).update(vars(old))  # what a user has noted on the parameter
    if old.requires_grad:  # a hook on the tensor would be lost without a word with the old one
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(hook)
        for hook in (old._post_accumulate_grad_hooks or {}).values():
            new.register_post_accumulate_grad_hook(hook)
    return new


def _install(model: nn.Module, narrowed: _NarrowedLayer) -> None:
    tensors = {**{change.name: change.new for change in narrowed.changes}, **narrowed.buffers}
    for name, tensor in tensors.items():
        owner, _, attribute = name.removeprefix(".").rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensor)
    layer = find_layer(model, narrowed.name)
    if isinstance(layer, nn.Module):
        set_widths(layer, narrowed.entries)
