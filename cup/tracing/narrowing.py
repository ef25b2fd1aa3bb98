"""Take channels out of a model's layers: the tensors, and the attributes that say how wide a layer is.

Shape suffixes: N entries of an axis that stay, K old entries that become one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from cup.errors import CupError
from cup.tracing.groups import Masks
from cup.tracing.heads import stop_shortcuts
from cup.tracing.layers import AxisName, find_layer, has_no_tensors, set_widths, tensor_names, weight_dim


@dataclass(frozen=True, eq=False)
class Merge:
    """How old entries of an axis become fewer: each new one is a weighted sum of old ones.

    members_NK: int64, the old entries of each new one. factors_NK: float64, what each counts; 0 where there are fewer.
    """

    members_NK: torch.Tensor
    factors_NK: torch.Tensor

    def apply(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """A new tensor, merged along `dim`. Sums are taken in a fixed order, so that all ranks get the same bits."""
        along = [-1 if other == dim else 1 for other in range(tensor.dim())]
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        merged = torch.zeros((), dtype=wide.dtype, device=wide.device)
        for members_N, factors_N in zip(self.members_NK.T, self.factors_NK.T, strict=True):
            factors = factors_N.to(wide.device, wide.dtype).view(along)
            merged = merged + wide.index_select(dim, members_N.to(wide.device)) * factors
        return merged.to(tensor.dtype)


Merges = Mapping[tuple[str, AxisName], Merge]
"""(module, axis) -> how the entries that stay take up those that go; axes on which none does are absent."""

NO_MERGES: Merges = {}


@dataclass(frozen=True, eq=False)
class ParameterChange:
    """What became of one parameter: new = old with the indices of each named axis selected.

    axes: dimension -> int64 kept indices, on the parameter's device. merges: dimension -> how its entries are merged
        instead, for those of the dimensions where any are.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    axes: Mapping[int, torch.Tensor]
    merges: Mapping[int, Merge]


def narrow_layers(model: nn.Module, masks: Masks, merges: Merges = NO_MERGES) -> tuple[ParameterChange, ...]:
    """Keep of every axis only what the masks say, in place; merged where `merges` says so.

    Raises CupError, with the model left as it was, where a layer cannot be narrowed.
    """
    indices: dict[str, dict[AxisName, torch.Tensor]] = {}
    for (module, axis), mask in masks.items():
        indices.setdefault(module, {})[axis] = torch.from_numpy(mask.nonzero()[0])
    merging: dict[str, dict[AxisName, Merge]] = {}
    for (module, axis), merge in merges.items():
        merging.setdefault(module, {})[axis] = merge
    renewed: dict[int, nn.Parameter] = {}
    narrowed = [
        _narrowed(model, name, axes, merging.get(name, {}), renewed) for name, axes in indices.items()
    ]  # all before any of it is installed
    for layer in narrowed:
        _install(model, layer)
    stop_shortcuts(model)
    return tuple(change for layer in narrowed for change in layer.changes)


def select(tensor: torch.Tensor, axes: Mapping[int, torch.Tensor], merges: Mapping[int, Merge]) -> torch.Tensor:
    """A new tensor with the given indices of each named dimension, in the memory format of the old one.

    merges: dimension -> what is done instead, to numbers that can be added up.
    """
    with torch.no_grad():
        narrowed = tensor.detach()
        for dim, index in axes.items():
            if dim in merges and tensor.is_floating_point():
                narrowed = merges[dim].apply(narrowed, dim)
            else:
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
    model: nn.Module,
    name: str,
    axes: Mapping[AxisName, torch.Tensor],
    merging: Mapping[AxisName, Merge],
    renewed: dict[int, nn.Parameter],
) -> _NarrowedLayer:
    """The layer's tensors along its "out" axis, its "in" axis or both; the layer itself stays as it is.

    renewed: id of an old parameter -> its new one, so that tied weights stay tied; added to.
    """
    layer = find_layer(model, name)
    weight_axes = {weight_dim(layer, axis): index for axis, index in axes.items()}
    weight_merges = {weight_dim(layer, axis): merge for axis, merge in merging.items()}
    if isinstance(layer, nn.Parameter):
        return _NarrowedLayer(name, (_change(model, name, weight_axes, weight_merges, renewed),), {})
    if isinstance(layer, torch.Tensor):
        return _NarrowedLayer(name, (), {name: select(layer, weight_axes, weight_merges)})
    if has_no_tensors(layer):
        return _NarrowedLayer(name, (), {}, len(axes["out"]))
    changes = []
    weight, bias = tensor_names(layer)
    if getattr(layer, weight) is not None:
        changes.append(_change(model, f"{name}.{weight}", weight_axes, weight_merges, renewed))
    if "out" not in axes:
        return _NarrowedLayer(name, tuple(changes), {})
    entries = {0: axes["out"]}
    entry_merges = {0: merging["out"]} if "out" in merging else {}
    if getattr(layer, bias, None) is not None:
        changes.append(_change(model, f"{name}.{bias}", entries, entry_merges, renewed))
    statistics = {key: getattr(layer, key, None) for key in ("running_mean", "running_var")}
    buffers = {
        f"{name}.{key}": select(value, entries, entry_merges) for key, value in statistics.items() if value is not None
    }
    return _NarrowedLayer(name, tuple(changes), buffers, len(axes["out"]))


def _change(
    model: nn.Module,
    name: str,
    axes: Mapping[int, torch.Tensor],
    merges: Mapping[int, Merge],
    renewed: dict[int, nn.Parameter],
) -> ParameterChange:
    name = name.removeprefix(".")  # of a network that is one layer
    try:
        old = model.get_parameter(name)
    except AttributeError as error:
        raise CupError(
            f"{name} is computed from other parameters, by a mask or a parametrization: trace again"
        ) from error
    if id(old) not in renewed:
        renewed[id(old)] = _renew(old, axes, merges)
    return ParameterChange(name, old, renewed[id(old)], dict(axes), dict(merges))


def _renew(old: nn.Parameter, axes: Mapping[int, torch.Tensor], merges: Mapping[int, Merge]) -> nn.Parameter:
    new = nn.Parameter(select(old, axes, merges), requires_grad=old.requires_grad)
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
    owner = model.get_submodule(narrowed.name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention):  # its output layer has another width than torch's code would think
        set_widths(owner, narrowed.entries)
