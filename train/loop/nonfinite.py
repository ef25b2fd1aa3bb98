"""Steps whose gradients are not finite, left out: no weight, momentum or running statistic takes anything from them.

The ranks decide alike without asking each other, for they look at gradients that DDP has summed already. Nothing waits
for the GPU: PyTorch's fused optimizers take the verdict as a tensor, as they do from a gradient scaler.
"""

import math

import torch

from train.network.state import TrainState

NEW_RUN = (
    "in a new run (another --run.name, and --model.checkpoint with the last checkpoint, which is untouched, if any)"
)
AFTER_NONFINITE = (
    f"lower optim.lr, or take bf16 in place of fp16, {NEW_RUN}, or go on and leave such steps out with "
    "--train.nonfinite skip"
)
AFTER_SKIPPING = f"look at the data, or lower optim.lr {NEW_RUN}"


class StepGuard:
    """Watches the optimizer steps of one rank. `begin` comes first, and again after every resize."""

    def __init__(self, device: torch.device) -> None:
        self.found_inf = torch.zeros((), device=device)
        """1 where the last step was left out, else 0."""
        self._in_a_row = torch.zeros((), device=device)
        self.longest = torch.zeros((), device=device)
        """The most steps left out one after another."""

    def begin(self, state: TrainState) -> None:
        """Take the tensors of the state as they are now."""
        self._parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        self._buffers = [buffer for buffer in state.model.buffers() if buffer.is_floating_point()]
        self._sizes = [buffer.numel() for buffer in self._buffers]
        self._saved_buffers = self._flat_buffers()

    def step(self, state: TrainState, clip_norm: float) -> None:
        """Make the optimizer's step with the gradients that are there, or leave it out and clear them."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf, foreach=True)
        self.found_inf = (~torch.isfinite(largest)).float()
        self._in_a_row = (self._in_a_row + 1) * self.found_inf
        self.longest = torch.maximum(self.longest, self._in_a_row)
        optimizer, may_step = state.optimizer, True
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = self.found_inf  # a gradient scaler checks for itself and overwrites it
        elif not state.precision.scaler.is_enabled():
            may_step = not bool(self.found_inf)  # other optimizers have to be skipped, so the host reads the flag
        if may_step:
            state.precision.step(optimizer, clip_norm)
        else:
            optimizer.zero_grad()
        self._restore_buffers()

    def _restore_buffers(self) -> None:
        """Put running statistics back to what they were before the step, if it was left out."""
        if self._buffers:
            self._saved_buffers = torch.where(self.found_inf > 0, self._saved_buffers, self._flat_buffers())
            parts = zip(self._saved_buffers.split(self._sizes), self._buffers, strict=True)
            torch._foreach_copy_(self._buffers, [part.view_as(buffer) for part, buffer in parts])

    def masked_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of the last step, 0 where it was left out."""
        return torch.where(self.found_inf > 0, 0.0, loss)

    def _flat_buffers(self) -> torch.Tensor | None:
        return torch.cat([buffer.reshape(-1) for buffer in self._buffers]) if self._buffers else None
