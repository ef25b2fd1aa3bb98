"""What a training step holds in a device's memory: an estimate, made without the device.

Activations are what autograd keeps for the backward pass, counted while the network runs on the meta device, where
tensors have shapes and no memory. Numbers with a point are counted at the size of the precision, so norms that autocast
keeps in fp32 are counted too low. On top come gradients in flight, weights and what goes with each of them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cup.cost.devices import ELEMENT_BYTES
from cup.tracing.meta import meta_copy
from train.config import RunConfig

GIB = 1024**3
IN_FLIGHT = 2
"""Tensors of the largest size that the backward pass holds at once: an operation's gradients of result and input."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes. activations: kept for the backward pass. in_flight: gradients of activations.

    weights: with gradients, the optimizer's state, the moving average, and copies in half precision.
    """

    activations: int
    in_flight: int
    weights: int

    @property
    def total(self) -> int:
        return self.activations + self.in_flight + self.weights


def step_memory(model: nn.Module, images: tuple[int, int, int, int], config: RunConfig) -> StepMemory:
    """What a step holds in eager mode, the allocator's reserve and the device's own context (1 GB or so) not counted.

    model: only read. images: (N, C, H, W) of one forward pass.
    """
    twin = meta_copy(model).train()
    sizes = _kept_bytes(twin, images, ELEMENT_BYTES[config.train.precision])
    return StepMemory(sum(sizes), IN_FLIGHT * max(sizes, default=0), _weight_bytes(twin, config))


def _kept_bytes(twin: nn.Module, images: tuple[int, int, int, int], element_bytes: int) -> list[int]:
    """Of each tensor that autograd keeps and that is no weight; views and values worked over in place count once."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = twin(torch.empty(images, device="meta"))
        loss = F.cross_entropy(logits, torch.zeros(images[0], dtype=torch.long, device="meta"))
        sizes = [
            tensor.untyped_storage().nbytes() * element_bytes // 4
            if tensor.is_floating_point()
            else tensor.untyped_storage().nbytes()
            for storage, tensor in kept.items()
            if storage not in weights
        ]
    del loss
    return sizes


def _weight_bytes(twin: nn.Module, config: RunConfig) -> int:
    """fp32: each weight; of those that are trained gradient and optimizer state; the moving average of all."""
    every = sum(parameter.numel() for parameter in twin.parameters())
    trained = sum(parameter.numel() for parameter in twin.parameters() if parameter.requires_grad)
    states = 2 if config.optim.name == "apex_lamb" else int(config.optim.momentum > 0)
    averages = int(config.train.ema_decay > 0)
    halves = 0 if config.train.precision == "fp32" else 2 * every
    return 4 * (every * (1 + averages) + trained * (1 + states)) + halves
