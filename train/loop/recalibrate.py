"""Batch norm's running statistics, measured anew: for networks that were put together without training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from data import Batch
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch], precision: Precision) -> None:
    """Set running means and variances to the plain means of the batches' own, in place; no weight changes.

    Batch norm works as in training meanwhile, all else as in evaluation: neither random numbers nor other buffers
    change. Any rank may call it alone.
    Source: "precise BN", Wu and Johnson, arXiv 2105.07576, section 3.
    """
    with _measuring(model):
        for batch in batches:
            with precision.autocast():
                model(batch.images.contiguous(memory_format=MEMORY_FORMAT))


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Inside, running statistics begin anew, and each forward pass counts the same in them."""
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    was_training, momenta = model.training, [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # which torch takes for the mean over all batches
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)
