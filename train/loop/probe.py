"""Images that a cut is judged by: those with which training goes on after it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from data import Batch, Loader
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.world import World


@contextmanager
def batches_ahead(loader: Loader, epoch: int, step: int) -> Iterator[Iterator[Batch]]:
    """The training batches from this step of this epoch on (both count from 0), as training will see them after it.

    Behind it the loader is where it was, random state included, so that looking ahead changes nothing in training.
    """
    loader.go_to(epoch, step)
    state = loader.state_dict()
    try:
        yield iter(loader)
    finally:
        loader.load_state_dict(state)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batch: Batch, precision: Precision, world: World) -> float:
    """Mean cross-entropy in evaluation mode over all ranks' batches, which are equally large. All ranks call it."""
    was_training = model.training
    model.eval()
    with precision.autocast():
        logits = model(batch.images.contiguous(memory_format=MEMORY_FORMAT))
    model.train(was_training)
    return world.all_reduce(F.cross_entropy(logits.float(), batch.labels)).item() / world.size
