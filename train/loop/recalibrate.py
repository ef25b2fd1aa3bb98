"""Batch norm's running statistics, measured anew after a cut: those of before are of another network."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from data import Batch
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT


@torch.no_grad()
def recalibrate(
    models: Sequence[nn.Module], batches: Iterable[Batch], precision: Precision, frozen: Collection[str] = ()
) -> None:
    """Set running means and variances to the plain means of the batches' own, in place; no weight changes.

    Batch norm works as in training meanwhile, all else as in evaluation: neither random numbers nor other buffers
    change. Each rank does it with batches of its own; averaging over the ranks is left to the caller.
    frozen: names of modules in which statistics stay.
    Source: "precise BN", Wu and Johnson, arXiv 2105.07576, section 3.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_measuring(model, frozen))
        for batch in batches:
            images = batch.images.contiguous(memory_format=MEMORY_FORMAT)
            for model in models:
                with precision.autocast():
                    model(images)


@contextmanager
def _measuring(model: nn.Module, frozen: Collection[str]) -> Iterator[None]:
    """Inside, running statistics begin anew, and each forward pass counts the same in them."""
    kept = {part for name in frozen for part in model.get_submodule(name).modules()}
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    norms = [norm for norm in norms if norm not in kept]
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
