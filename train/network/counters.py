"""Counters of the passes that batch norms have seen, in one operation for all of them where each would need its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

COUNTER = "num_batches_tracked"
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def counted_together(model: nn.Module, passes: int) -> Iterator[None]:
    """Inside, torch's own batch norms do not count in training; behind it their counters are up by the passes.

    A norm that runs twice in a pass, or not at all, counts one like the others. Those whose momentum is None count as
    ever, for their running statistics depend on it, and so do subclasses, which may need the counter
    (`nn.SyncBatchNorm` refuses to run without). The counters are the same tensors as before; inside, a state_dict lacks
    them. passes: forward passes of the model inside. Nothing is counted where an error ends them.
    """
    norms = [module for module in model.modules() if type(module) in PLAIN and _merely_counts(module)]
    counters = [norm._buffers[COUNTER] for norm in norms]
    for norm in norms:
        norm._buffers[COUNTER] = None  # which their forward takes for one that is not to be counted
    try:
        yield
    finally:
        for norm, counter in zip(norms, counters, strict=True):
            norm._buffers[COUNTER] = counter
    if counters:
        torch._foreach_add_(counters, passes)


def _merely_counts(norm: _BatchNorm) -> bool:
    return norm.training and norm.momentum is not None and norm._buffers.get(COUNTER) is not None
