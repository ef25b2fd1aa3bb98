"""Exact accuracy over a validation set."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

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
    class_images: tuple[int, ...] = ()
    """Images of each class, by label."""
    class_hits: tuple[int, ...] = ()
    """Those of them whose class was the first guess."""


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
    # Of each class: images, top-1 hits, top-5 hits.
    counts_3K = torch.zeros(3, loader.num_classes, dtype=torch.int64, device=world.device)
    for batch in loader:
        with precision.autocast(), _logits_in_fp32(model, loader.num_classes, precision):
            logits = model(batch.images.contiguous(memory_format=MEMORY_FORMAT))
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (guesses == batch.labels[:, None]) & batch.valid[:, None]
        found_3B = torch.stack([batch.valid, hits[:, 0], hits.any(dim=1)])
        counts_3K.index_add_(1, batch.labels, found_3B.to(torch.int64))
        after_batch()
    model.train(was_training)
    class_images, class_hits, class_top5 = world.all_reduce(counts_3K).tolist()
    images = sum(class_images)
    return Evaluation(
        top1=100 * sum(class_hits) / images,
        top5=100 * sum(class_top5) / images,
        images=images,
        class_images=tuple(class_images),
        class_hits=tuple(class_hits),
    )


@contextmanager
def _logits_in_fp32(model: nn.Module, num_classes: int, precision: Precision) -> Iterator[None]:
    """Inside, the last linear layer of so many outputs gives fp32's; a network without one is left as it is.

    bf16 has 8 bits: close logits become equal, and which of two equal ones is the first guess is chance.
    """
    linear = [part for part in model.modules() if type(part) is nn.Linear]  # a subclass may compute something else
    classifiers = [part for part in linear if part.out_features == num_classes]
    if precision.name == "fp32" or not classifiers:
        yield
        return

    def again(layer: nn.Linear, inputs: tuple[torch.Tensor, ...], rounded: torch.Tensor) -> torch.Tensor:
        with torch.autocast(rounded.device.type, enabled=False):
            return F.linear(inputs[0].float(), layer.weight, layer.bias)

    handle = classifiers[-1].register_forward_hook(again)
    try:
        yield
    finally:
        handle.remove()
