"""One optimizer step: forward, backward, step, EMA."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from data import Batch
from train.loop.config import TrainConfig
from train.loop.nonfinite import StepGuard
from train.loop.teacher import Teacher
from train.methods import Dense, Method
from train.network.counters import counted_together
from train.network.state import MEMORY_FORMAT, TrainState
from train.world import World, no_sync

NO_METHOD = Dense()


def training_step(
    state: TrainState,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: TrainConfig,
    guard: StepGuard | None = None,
    method: Method = NO_METHOD,
    teacher: Teacher | None = None,
) -> torch.Tensor:
    """Forward, backward, optimizer step and EMA on one batch; returns this rank's loss, a detached scalar tensor.

    images: (B, C, H, W). labels: int64 (B,), or float (B, classes) where images were mixed. With config.accumulate the
    batch is split into micro-batches, whose gradients add up to the batch's; DDP reduces them once, with the last.
    guard: leaves the step out where gradients are not finite. method: its penalty is added to what is differentiated,
    not to the loss that is returned; it may change the gradients. teacher: takes its share of the loss.
    """
    loss = compute_gradients(state, images, labels, config, method, teacher)
    method.after_backward(state.model)
    if guard is None:
        state.precision.step(state.optimizer, config.clip_norm)
    else:
        guard.step(state, config.clip_norm)
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    return loss


def compute_gradients(
    state: TrainState,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: TrainConfig,
    method: Method = NO_METHOD,
    teacher: Teacher | None = None,
) -> torch.Tensor:
    """Forward and backward pass; returns the loss."""
    count = min(config.accumulate, len(labels))
    pieces = list(zip(images.tensor_split(count), labels.tensor_split(count), strict=True))
    with counted_together(state.model, len(pieces)):
        return _gradients_of(state, pieces, config, method, teacher)


def _gradients_of(
    state: TrainState,
    pieces: list[tuple[torch.Tensor, torch.Tensor]],
    config: TrainConfig,
    method: Method,
    teacher: Teacher | None,
) -> torch.Tensor:
    """Of a batch in pieces of images and labels; returns its loss."""
    mean_loss, total = torch.zeros((), device=pieces[0][0].device), sum(len(labels) for _, labels in pieces)
    for number, (some_images, some_labels) in enumerate(pieces, start=1):
        is_last = number == len(pieces)
        with nullcontext() if is_last else no_sync(state.parallel):
            with state.precision.autocast():
                logits = state.parallel(some_images.contiguous(memory_format=MEMORY_FORMAT))
                loss = F.cross_entropy(logits, some_labels, label_smoothing=config.label_smoothing)
            if teacher is not None:
                loss = teacher.taught(loss, some_images, logits)
            loss = loss * (len(some_labels) / total)
            mean_loss += loss.detach()
            if is_last and (penalty := method.penalty(state.model)) is not None:
                loss = loss + penalty
            state.precision.backward(loss)
    return mean_loss


def warm_up_buckets(state: TrainState, batch: Batch, config: TrainConfig, world: World) -> None:
    """Let DDP see a backward pass that changes nothing else. All ranks call it.

    DDP lays its buckets out anew after the first pass that it sees, and with three or more ranks the layout decides in
    which order gradients are summed. A resumed run needs that pass before its first step wherever the undisturbed run
    had it behind it.
    """
    buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        compute_gradients(state, batch.images, batch.labels, config)
    state.optimizer.zero_grad()
    for name, buffer in state.model.named_buffers():
        buffer.copy_(buffers[name])
