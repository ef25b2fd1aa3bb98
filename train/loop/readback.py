"""Numbers of the device that the host looks at, without the host ever waiting for work that it has just queued.

A value read with `item` makes the host wait until the device has done everything before it, and then the device until
the host has queued more. So what is to be looked at is copied to page-locked memory, behind the work that makes it, and
read at the next look, about a second later, when it has long been there.
"""

from typing import TypeVar

import torch

T = TypeVar("T")


class Readback:
    """One of each rank. On the CPU nothing is queued, and values are there at once."""

    def __init__(self, device: torch.device) -> None:
        self._is_behind = device.type == "cuda"
        self._values: torch.Tensor | None = None
        self._arrival: torch.cuda.Event | None = None

    def exchange(self, values_N: torch.Tensor, of: T) -> tuple[list[float], T] | None:
        """Send these, float32 (N,), and return the newest that are there for sure; None before there are any.

        of: what the host wants to know of values when it sees them, such as their step; comes back with them.
        On a GPU the values of the call before return. It waits only where the GPU is that far behind.
        """
        if not self._is_behind:
            return values_N.tolist(), of
        arrived = None
        if self._values is None:
            self._values, self._arrival = _page_locked(values_N), torch.cuda.Event()
        else:
            self._arrival.synchronize()
            arrived = self._values.tolist(), self._of
        self._values.copy_(values_N, non_blocking=True)
        self._arrival.record()
        self._of = of
        return arrived


def _page_locked(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
