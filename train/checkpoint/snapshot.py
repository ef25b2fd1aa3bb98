"""A copy of a run's state on the host: what a checkpoint is written from while training goes on."""

import copy
from collections.abc import Iterator
from typing import Any

import torch


def snapshot(content: dict[str, Any]) -> dict[str, Any]:
    """The same content in memory that nobody else changes, its tensors on the CPU; strides stay.

    From a GPU they come through pinned memory, all at once, and are waited for. torch keeps pinned memory for the next
    time, when the copy is dropped.
    """
    tensors = list(_tensors(content))
    on_host = {id(tensor): _on_host(tensor) for tensor in tensors}
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copy.deepcopy(content, on_host)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.clone()
    try:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:  # no page-locked memory is left: a slower save is better than none
        host = torch.empty_like(tensor, device="cpu")
    return host.copy_(tensor, non_blocking=True)
