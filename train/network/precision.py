"""fp32, bf16 and fp16 through one code path: autocast that may be off, and a scaler that may do nothing."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

PrecisionName = Literal["fp32", "bf16", "fp16"]


class Precision:
    """Weights stay fp32; the forward pass runs in `name`. Only fp16 needs its loss scaled."""

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.name = name
        self._device_type = device.type
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one (micro-)batch's loss."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0) -> None:
        """Clip the gradients to `clip_norm` (0 = not at all), step, and clear them."""
        if clip_norm > 0:
            self.scaler.unscale_(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
