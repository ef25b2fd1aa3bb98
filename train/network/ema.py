"""The moving average of the weights that is evaluated in their place."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """Exponential moving average of parameters and running statistics; the first update copies them.

    A step costs two operations, whatever the network. torch's own `update_parameters` takes 218 for ResNet-50, for it
    averages integer buffers, too, one by one, and reads a tensor to know whether it is the first update. Here batch
    norm's counts of batches are copied once an epoch by `copy_counters`: no evaluation reads them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """model: copied. decay: of the average a step, from 0 to below 1."""
        super().__init__(model, use_buffers=True)
        self._decay = decay
        self._is_new = True
        self._tensors: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def begin(self) -> None:
        """Look the tensors up again at the next update; comes before the first step after a resize."""
        self._tensors = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the model's weights and running statistics as they are."""
        if self._tensors is None:
            self._tensors = _floating_tensors(self.module), _floating_tensors(model)
        own, theirs = self._tensors
        if self._is_new:
            torch._foreach_copy_(own, theirs)
            self.copy_counters(model)
            self._is_new = False
        else:
            torch._foreach_lerp_(own, theirs, 1 - self._decay)
        self.n_averaged += 1  # in the checkpoint it tells whether there was a first update

    @torch.no_grad()
    def copy_counters(self, model: nn.Module) -> None:
        """Copy the buffers that hold no floating-point numbers, such as batch norm's counts of batches."""
        for own, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            if not own.is_floating_point():
                own.copy_(theirs)

    def load_state_dict(self, *args: object, **kwargs: object) -> object:
        loaded = super().load_state_dict(*args, **kwargs)
        self._is_new = not bool(self.n_averaged)
        return loaded


def _floating_tensors(module: nn.Module) -> list[torch.Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
