"""Exact accuracy over a validation set."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from data import Loader
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.world import World


@dataclass(frozen=True)
class Evaluation:
    """Exact accuracy over the whole validation set, all ranks together."""

    top1: float
    """Percent."""
    top5: float
    """Percent; of as many guesses as there are classes where these are fewer than 5."""
    images: int


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader: Loader,
    precision: Precision,
    world: World,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Exact top-1 and top-5 of `model` in evaluation mode; padding, as the validity mask says, is not counted.

    All ranks call it. after_batch: called between two batches.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)  # top-1 hits, top-5 hits, images
    for batch in loader:
        with precision.autocast():
            logits = model(batch.images.contiguous(memory_format=MEMORY_FORMAT))
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (guesses == batch.labels[:, None]) & batch.valid[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum(), batch.valid.sum()])
        after_batch()
    model.train(was_training)
    top1, top5, images = world.all_reduce(counts).tolist()
    return Evaluation(100 * top1 / images, 100 * top5 / images, images)
