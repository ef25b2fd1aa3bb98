"""Shape-only twins: a network without its memory, to ask what a forward pass would do."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from cup.errors import CupError

# Sides to try for a network whose input nobody named. Adaptive pooling takes them all; where a flatten fixes the
# side, only the right one runs, so one that runs gives the same channel groups as any other that does.
SIDES = (224, 32, 28, 299, 64)


def meta_copy(model: nn.Module) -> nn.Module:
    """The same modules on the meta device, as fp32 and without hooks; allocates no tensor memory, copies no data."""
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
    return twin


def meta_input(shape: Sequence[int], batch: int) -> torch.Tensor:
    """A float32 tensor (batch, *shape) on the meta device."""
    return torch.empty((batch, *shape), device="meta")


def does_not_take(model: nn.Module, shape: Sequence[int], error: Exception) -> str:
    """The one line about a forward pass that failed on samples of this shape."""
    return f"{type(model).__name__} does not take inputs of shape {tuple(shape)}: {first_line(error)}"


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def find_input_shape(model: nn.Module) -> tuple[int, ...]:
    """The shape of one sample that this network takes, by trying common ones. CupError if none fits."""
    twin = meta_copy(model).eval()
    for shape in _candidate_shapes(model):
        try:
            with torch.no_grad(), torch.device("meta"):
                twin(meta_input(shape, batch=1))
        except (RuntimeError, ValueError):
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
