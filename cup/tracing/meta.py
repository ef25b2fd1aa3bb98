"""Shape-only twins: a network without its memory, to ask what a forward pass would do."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cup.errors import CupError
from cup.tracing.heads import can_be_cut, spell_out

# Sides to try for a network whose input nobody named. Adaptive pooling takes them all; where a flatten fixes the
# side, only the right one runs, so one that runs gives the same channel groups as any other that does.
SIDES = (224, 32, 28, 299, 64)


def check_model(model: nn.Module) -> None:
    """Raise CupError for what is no network of its own: a wrapper around one, or one without all of its parameters."""
    kind = type(model)
    inner = "_orig_mod" if hasattr(model, "_orig_mod") else "module"
    if hasattr(model, "_orig_mod") or kind.__module__.startswith("torch.nn.parallel.") or "FullyShard" in kind.__name__:
        raise CupError(f"found {kind.__name__}, a wrapper around the network: give model.{inner}")
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    lazy += [name for name, buffer in model.named_buffers() if nn.parameter.is_lazy(buffer)]
    if lazy:
        raise CupError(f"{lazy[0]} has no shape yet: run the network once, so that its lazy modules get theirs")


def hooked_modules(model: nn.Module) -> set[str]:
    """Names of the modules whose forward hooks may change what they read or give."""
    return {name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks}


def meta_copy(model: nn.Module) -> nn.Module:
    """The same modules on the meta device, as fp32 and without hooks; allocates no tensor memory, copies no data.

    torch's attention does the same there in single steps, which can be followed.
    """
    memo: dict[int, torch.Tensor] = {}
    for tensor in model.buffers():
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for module in model.modules():  # what a hook computes from parameters: a mask's product, a normed weight
        for tensor in filter(torch.is_tensor, vars(module).values()):
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    twin = copy.deepcopy(model, memo).float()
    for module in twin.modules():  # a user's hooks expect real activations, and should not see this pass
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
        if can_be_cut(module):
            spell_out(module)
    return twin


@dataclass(frozen=True)
class OneInput:
    """One of several inputs of a network: its shape for one sample, the batch dimension included where it has one.

    batched: whether its first dimension is the batch.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool


Sample = Any
"""One sample's shape, without the batch; of several inputs, the example's tuple, list or dict of `OneInput`s."""


def sample_of(example_input: Any) -> Sample:
    """What `meta_input` needs to know of an example: a tensor (N, ...), or several of them in a tuple, list or dict.

    Of several, the first says N; others of the same length are taken to be batches, too. What is no tensor stays.
    """
    if isinstance(example_input, torch.Tensor):
        return tuple(example_input.shape[1:])
    tensors = list(tensors_in(example_input))
    if not isinstance(example_input, tuple | list | dict) or not tensors:
        found = f"{type(example_input).__name__} without tensors" * isinstance(example_input, tuple | list | dict)
        raise CupError(
            f"example_input: found {found or type(example_input).__name__}, allowed: a tensor (N, ...), a tuple of the "
            "network's arguments, or a dict of them by name"
        )
    size = tensors[0].shape[:1]
    return map_tensors(
        example_input,
        lambda value: OneInput(tuple(value.shape), value.dtype, value.dim() > 0 and value.shape[:1] == size),
    )


def meta_input(sample: Sample, batch: int) -> Any:
    """The network's input on the meta device for so many samples; where it is one tensor, float32 (batch, *sample)."""
    if isinstance(sample, tuple) and all(isinstance(size, int) for size in sample):
        return torch.empty((batch, *sample), device="meta")
    return _map_leaves(sample, OneInput, lambda one: _on_meta(one, batch))


def _on_meta(one: OneInput, batch: int) -> torch.Tensor:
    shape = (batch, *one.shape[1:]) if one.batched else one.shape
    return torch.empty(shape, dtype=torch.float32 if one.dtype.is_floating_point else one.dtype, device="meta")


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, named) arguments of the forward pass: a tuple's entries, a dict's, or the one input."""
    if isinstance(inputs, dict):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same tuples, lists and dicts with every tensor in them changed."""
    return _map_leaves(value, torch.Tensor, change)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def _map_leaves(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_leaves(item, kind, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_map_leaves(item, kind, change) for item in value])
    return value


def does_not_take(model: nn.Module, sample: Sample, error: Exception) -> str:
    """The one line about a forward pass that failed on such samples."""
    shapes = _map_leaves(sample, OneInput, lambda one: one.shape)
    return f"{type(model).__name__} does not take inputs of shape {shapes}: {first_line(error)}"


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def find_input_shape(model: nn.Module) -> tuple[int, ...]:
    """The shape of one sample that this network takes, by trying common ones. CupError if none fits."""
    twin = meta_copy(model).eval()
    for shape in _candidate_shapes(model):
        try:
            with torch.no_grad(), torch.device("meta"):
                twin(meta_input(shape, batch=1))
        except (AssertionError, RuntimeError, ValueError):
            continue
        return shape
    raise CupError("no input shape found that this network takes: pass example_input, a tensor of shape (N, ...)")


def _candidate_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            return [(module.in_features,)]
        if isinstance(module, nn.Conv2d):
            return [(module.in_channels, side, side) for side in SIDES]
    return []
