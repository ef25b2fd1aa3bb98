"""The training loop.

    fit:
        for each epoch, or what is left of it after a resume:
            resize the network, if the schedule says so         # train/resizer.py
            train_epoch: for each batch, mixup or cutmix, learning rate, forward, backward, step, EMA
            average batch-norm statistics over the ranks
            evaluate                                            # exact, padding counts for nothing
            write one epoch line, save `last` (and `best`)
        write the closing line

Between any two steps, of training or evaluation, the run may be saved, and may stop (train/loop/watch.py).
Every function here is called by all ranks.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F

from data import Batch, Loader
from train.errors import TrainError
from train.log.ledger import Kind, Ledger
from train.log.sinks import Sinks
from train.loop.mixing import Mixing
from train.loop.nonfinite import StepGuard
from train.loop.watch import Watch
from train.network.compiling import BlockCompiler, compile_errors
from train.network.optim import OptimConfig, learning_rate, set_learning_rate
from train.network.precision import Precision, PrecisionName
from train.network.state import MEMORY_FORMAT, TrainState
from train.resizer import ResizeOutcome, Resizer
from train.world import World, exchange_wait_s, without_exchange

NOT_TRAINING = ("startup", "eval", "save", "lost")
"""Kinds of seconds that do not count when images a second are told."""
NEW_RUN = "in a new run (another --run.name, and --model.from with the last checkpoint, which is untouched, if any)"
AFTER_NONFINITE = (
    f"lower optim.lr, or take bf16 in place of fp16, {NEW_RUN}, or go on and leave such steps out with "
    "--train.loop.nonfinite skip"
)
AFTER_SKIPPING = f"look at the data, or lower optim.lr {NEW_RUN}"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = 90
    """Passes over the training set."""
    precision: PrecisionName = "fp32"
    """fp32, bf16 (autocast), or fp16 (autocast with a gradient scaler)."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, 0 to below 1."""
    mixup: float = 0.0
    """Alpha of mixup: images and labels are mixed with shares drawn from Beta(alpha, alpha); 0 = none."""
    cutmix: float = 0.0
    """Alpha of cutmix, which puts a rectangle of one image into another; 0 = none. With both, either at random."""
    accumulate: int = 1
    """Pieces that a rank's batch is cut into, one forward and backward pass each, to one optimizer step: the same step
    in less memory, but for batch norm, which sees a piece at a time."""
    clip_norm: float = 0.0
    """Gradients are scaled down to this L2 norm over the whole network where theirs is larger; 0 = never."""
    compile: Literal["none", "blocks"] = "none"
    """blocks = torch.compile on the network's repeated blocks, where enough steps at the same widths and image size lie
    ahead."""
    compile_steps: int = 6000
    """How many steps at the same widths and image size are enough: so many pay for a minute of compiling where each
    gets 10 ms shorter."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights a step, evaluated instead of them; 0 = none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss that is NaN or infinite does: stop = it ends the run; skip = a step whose gradients are not finite
    changes nothing, on all ranks alike, but that a moving average takes the unchanged weights once more."""
    nonfinite_limit: int = 25
    """With skip: as many such steps in a row end the run. fp16 leaves out about ten by itself to find its scale."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        checks = [
            ("epochs", self.epochs >= 1, "a whole number from 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("mixup", self.mixup >= 0, "a number from 0"),
            ("cutmix", self.cutmix >= 0, "a number from 0"),
            ("accumulate", self.accumulate >= 1, "a whole number from 1"),
            ("clip_norm", self.clip_norm >= 0, "a number from 0"),
            ("compile_steps", self.compile_steps >= 1, "a whole number from 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1"),
            ("nonfinite_limit", self.nonfinite_limit >= 1, "a whole number from 1"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")


@dataclass
class Trainer:
    """Everything that the loop works with, on one rank."""

    config: TrainConfig
    optim: OptimConfig
    world: World
    train_loader: Loader
    val_loader: Loader
    mix: Mixing
    compiler: BlockCompiler
    state: TrainState
    resizer: Resizer
    ledger: Ledger
    sinks: Sinks
    progress: "Progress"
    watch: Watch
    guard: StepGuard | None = None
    """Leaves out steps that are not finite; None with train.loop.nonfinite: stop."""
    so_far: "EpochSoFar | None" = None
    """The epoch that is under way; None between two epochs."""
    is_resumed: bool = False
    """Whether the next step is the first of this process, and not of the run."""
    save: Callable[["Trainer", bool], None] = lambda trainer, is_best: None
    """Writes a checkpoint of this trainer; the flag says whether it is the best so far. All ranks call it."""


class Stopped(Exception):
    """Somebody asked the run to stop; it was saved after its last step. Raised on all ranks."""


@dataclass
class Progress:
    """How far a run is, and how well it did; goes into the checkpoint."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps made."""
    resizes: int = 0
    wrapped_at: int = 0
    """`step` when the network was last put into DDP in an undisturbed run: at the start and after each resize."""
    compiled: bool = False
    """Whether the network's blocks ran compiled in the last epoch that began."""
    gpu_hours_before: float | None = 0.0
    """Spent on the weights before this run started from them; None where nobody knows."""
    best_top1: float = -1.0
    best_top5: float = -1.0
    last_line: dict[str, Any] = field(default_factory=dict)
    """The epoch event of the last finished epoch."""


@dataclass
class EpochSoFar:
    """The epoch that a run is in the middle of, on one rank; goes into the checkpoint for a resume to go on there."""

    threshold: float | None
    """Height t of the cut at its start, None where there was none."""
    seconds_before: dict[str, float]
    """The ledger at its start."""
    loss_sum: torch.Tensor
    """Of this rank's steps, float32 scalar."""
    skipped: torch.Tensor
    """Steps left out because they were not finite, float32 scalar; equal on all ranks."""
    step: int = 0
    """Steps of the epoch that are made."""
    images: int = 0
    """In these steps, all ranks together."""
    is_averaged: bool = False
    """Whether the ranks' batch-norm statistics are averaged already: only the evaluation is left."""

    @classmethod
    def beginning(cls, trainer: Trainer, threshold: float | None) -> "EpochSoFar":
        nothing = torch.zeros((), device=trainer.world.device)
        return cls(threshold, trainer.ledger.seconds, nothing, nothing.clone())

    @staticmethod
    def restored(ranks: Sequence["EpochSoFar"], world: World, batch_ratio: Fraction, steps: int) -> "EpochSoFar":
        """This rank's part of an epoch that `ranks` were in the middle of, who may have been fewer or more.

        batch_ratio: images a step now over images a step then. steps: of the epoch, now. The same images are done, to
        within a batch, and the mean of the losses so far stays what it is.
        """
        so_far = ranks[min(world.rank, len(ranks) - 1)]
        so_far = replace(so_far, loss_sum=so_far.loss_sum.to(world.device), skipped=so_far.skipped.to(world.device))
        if (len(ranks), batch_ratio) != (world.size, 1) or so_far.step > steps:  # the set may have lost images
            kept = max(so_far.step - float(so_far.skipped), 1)
            mean = sum(float(rank.loss_sum) for rank in ranks) / (kept * len(ranks))
            so_far.step = min(math.floor(so_far.step / batch_ratio), steps)
            so_far.skipped = (so_far.skipped / float(batch_ratio)).floor().clamp(max=so_far.step)
            kept = so_far.step - float(so_far.skipped)
            so_far.loss_sum.fill_(mean * kept * world.size if world.is_main else 0.0)
        so_far.is_averaged &= so_far.step == steps  # smaller batches or more images may leave a step to make
        return so_far

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"loss_sum": self.loss_sum.cpu(), "skipped": self.skipped.cpu()}


@dataclass(frozen=True)
class Evaluation:
    """Exact accuracy over the whole validation set, all ranks together."""

    top1: float
    """Percent."""
    top5: float
    """Percent; of as many guesses as there are classes where these are fewer than 5."""
    images: int


def fit(trainer: Trainer) -> dict[str, Any]:
    """Train from where `trainer.progress` stands to the last epoch; returns the closing event.

    Raises Stopped, after a checkpoint, if somebody asked for it.
    """
    for epoch in range(trainer.progress.epoch + 1, trainer.config.epochs + 1):
        just_resized = False
        if trainer.so_far is None:
            outcome = _resize(trainer, epoch)
            just_resized = bool(outcome.removed)
            trainer.so_far = EpochSoFar.beginning(trainer, outcome.threshold)
        loss, images_per_s = train_epoch(trainer, epoch, just_resized)
        if not math.isfinite(loss):  # the mean over all ranks, so all of them stop here
            if trainer.guard is not None and trainer.so_far.skipped >= trainer.so_far.step:
                raise TrainError(
                    f"all {trainer.so_far.step} steps of epoch {epoch} were left out, for their gradients were not "
                    f"finite: {AFTER_SKIPPING}"
                )
            raise TrainError(f"the loss is {loss} in epoch {epoch}: {AFTER_NONFINITE}")
        with trainer.ledger.charge("eval"):
            result = _evaluate(trainer)
        line = _epoch_line(trainer, epoch, trainer.so_far, loss, images_per_s, result)
        trainer.so_far = None
        is_best = _advance(trainer.progress, line)
        trainer.sinks.write(line)
        with trainer.ledger.charge("save"):
            trainer.save(trainer, is_best)
        if epoch < trainer.config.epochs and trainer.watch.look().stop:
            raise Stopped
    return _closing_line(trainer)


def train_epoch(trainer: Trainer, epoch: int, just_resized: bool) -> tuple[float, float]:
    """The rest of a pass over the training set; returns (mean loss, images a second, all ranks together).

    Both are of the whole pass, whatever part of it an earlier process made.
    """
    state, loader, world, so_far = trainer.state, trainer.train_loader, trainer.world, trainer.so_far
    state.parallel.train()
    loader.go_to(epoch - 1, so_far.step)
    steps = len(loader)
    trainer.watch.restart()
    if trainer.guard is not None:
        trainer.guard.begin(state)
    compiled, compiles = trainer.compiler.at_epoch_start(epoch, steps, just_resized, trainer.progress.compiled)
    trainer.progress.compiled = compiled
    # The first step after a resize builds DDP's buckets and picks kernels for the new shapes.
    first_step, first_kind = so_far.step, "compile" if compiles else "resize_warmup" if just_resized else "step"
    what = f"epoch {epoch}/{trainer.config.epochs}, FR {trainer.resizer.reduction:.2f}"
    batches = iter(loader)
    for step in range(so_far.step, steps):
        with trainer.ledger.charge("data_wait"):
            batch = next(batches)
        kind: Kind = first_kind if step == first_step else "step"
        with trainer.ledger.charge(kind), compile_errors() if kind == "compile" else nullcontext():
            lr = learning_rate(trainer.optim, epoch - 1 + step / steps, trainer.config.epochs)
            set_learning_rate(state.optimizer, lr)
            if trainer.is_resumed:
                trainer.is_resumed = False
                _form_buckets(trainer, batch)
            images, labels = trainer.mix(batch.images, batch.labels)
            loss = training_step(state, images, labels, trainer.config, trainer.guard)
            if trainer.guard is not None:
                loss = trainer.guard.counted(loss)
                so_far.skipped += trainer.guard.unfit
            so_far.loss_sum += loss
            if kind != "step":
                world.synchronize()
        so_far.step += 1
        so_far.images += len(batch.labels) * world.size
        trainer.progress.step += 1
        trainer.sinks.progress(what, step + 1, steps)
        _look(trainer, epoch)

    with trainer.ledger.charge("step"):
        kept = steps - so_far.skipped.item()
        loss_sum = world.sum(so_far.loss_sum.clone()).item()
        mean_loss = loss_sum / (kept * world.size) if kept else math.nan
    seconds = {kind: total - so_far.seconds_before[kind] for kind, total in trainer.ledger.seconds.items()}
    return mean_loss, so_far.images / sum(spent for kind, spent in seconds.items() if kind not in NOT_TRAINING)


def _look(trainer: Trainer, epoch: int) -> None:
    """After a step: save, stop or give up, if the ranks have agreed to. Raises Stopped or TrainError on all of them."""

    def is_broken() -> bool:
        if trainer.guard is not None:
            return bool(trainer.guard.longest >= trainer.config.nonfinite_limit)
        return not bool(torch.isfinite(trainer.so_far.loss_sum))

    decision = trainer.watch.step(is_broken)
    if decision is None:
        return
    where = f"in epoch {epoch}, at or before step {trainer.so_far.step}"
    if decision.broken and trainer.guard is not None:
        raise TrainError(
            f"{trainer.config.nonfinite_limit} steps in a row were not finite {where} (train.nonfinite_limit): "
            f"{AFTER_SKIPPING}"
        )
    if decision.broken:
        raise TrainError(f"the loss is not finite {where}: {AFTER_NONFINITE}")
    if decision.save or decision.stop:
        with trainer.ledger.charge("save"):
            trainer.save(trainer, False)
    if decision.stop:
        raise Stopped


def _evaluate(trainer: Trainer) -> Evaluation:
    state, world, so_far = trainer.state, trainer.world, trainer.so_far
    if not so_far.is_averaged:
        world.average_buffers(state.model)
        if state.ema is not None:
            world.average_buffers(state.ema)
        so_far.is_averaged = True
    trainer.watch.restart()
    epoch = trainer.progress.epoch + 1
    with trainer.compiler.paused():
        return evaluate(state.best_model, trainer.val_loader, state.precision, world, lambda: _look(trainer, epoch))


def training_step(
    state: TrainState,
    images: torch.Tensor,
    labels: torch.Tensor,
    config: TrainConfig,
    guard: StepGuard | None = None,
) -> torch.Tensor:
    """Forward, backward, optimizer step and EMA on one batch; returns this rank's loss, a detached scalar tensor.

    images: (B, C, H, W). labels: int64 (B,), or float (B, classes) where images were mixed. With config.accumulate the
    batch goes through in pieces, whose gradients add up to the batch's; the ranks exchange them once, with the last.
    guard: leaves the step out where gradients are not finite.
    """
    mean_loss = _gradients(state, images, labels, config)
    if guard is None:
        state.precision.step(state.optimizer, config.clip_norm)
    else:
        guard.step(state, config.clip_norm)
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    return mean_loss


def _gradients(state: TrainState, images: torch.Tensor, labels: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """Forward and backward pass; returns the loss."""
    mean_loss = torch.zeros((), device=images.device)
    pieces = list(zip(images.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True))
    for number, (some_images, some_labels) in enumerate(pieces, start=1):
        with nullcontext() if number == len(pieces) else without_exchange(state.parallel):
            with state.precision.autocast():
                logits = state.parallel(some_images.contiguous(memory_format=MEMORY_FORMAT))
                loss = F.cross_entropy(logits, some_labels, label_smoothing=config.label_smoothing)
            loss = loss * (len(some_labels) / len(labels))
            state.precision.backward(loss)
        mean_loss += loss.detach()
    return mean_loss


def _form_buckets(trainer: Trainer, batch: Batch) -> None:
    """Before the first step after a resume: let DDP see a backward pass, which changes nothing else.

    DDP lays its buckets out anew after the first one that it sees, and with three or more ranks the layout decides in
    which order gradients are summed. An undisturbed run had that pass behind it, unless it had just been put into DDP.
    """
    world, state, progress = trainer.world, trainer.state, trainer.progress
    if world.size == 1 or progress.step == progress.wrapped_at:
        return
    buffers = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        _gradients(state, batch.images, batch.labels, trainer.config)
    state.optimizer.zero_grad()
    for name, buffer in state.model.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    loader: Loader,
    precision: Precision,
    world: World,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Exact top-1 and top-5 of `model` in evaluation mode; what the validity mask marks as padding is not counted."""
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
    top1, top5, images = world.sum(counts).tolist()
    return Evaluation(100 * top1 / images, 100 * top5 / images, images)


def _resize(trainer: Trainer, epoch: int) -> ResizeOutcome:
    """Let the hook resize, and write what it did."""
    trainer.watch.beat()
    started = trainer.ledger.seconds["resize"]
    with trainer.ledger.charge("resize"):
        outcome = trainer.resizer.at_epoch_start(epoch, trainer.state, trainer.world)
        trainer.world.synchronize()
    seconds = trainer.ledger.seconds["resize"] - started
    trainer.watch.beat()
    if outcome.note:
        trainer.sinks.write({"event": "note", "time_s": trainer.ledger.total_s, "message": outcome.note})
    if outcome.removed:
        trainer.progress.resizes += 1
        trainer.progress.wrapped_at = trainer.progress.step
        trainer.sinks.write(
            {
                "event": "resize",
                "time_s": trainer.ledger.total_s,
                "epoch": epoch,
                "step": trainer.progress.step,
                "threshold": outcome.threshold,
                "flops_reduction_before": outcome.reduction_before,
                "flops_reduction_after": outcome.reduction_after,
                "removed": outcome.removed,
                "seconds": seconds,
                "digest": outcome.digests[0],
                "digests": outcome.digests,
            }
        )
    elif outcome.threshold is not None:
        message = f"epoch {epoch}: a cut at t {outcome.threshold:.3f} removes nothing"
        trainer.sinks.write({"event": "note", "time_s": trainer.ledger.total_s, "message": message})
    return outcome


def _epoch_line(
    trainer: Trainer, epoch: int, so_far: EpochSoFar, loss: float, images_per_s: float, result: Evaluation
) -> dict[str, Any]:
    """The epoch event of DESIGN.md "The log line"; its seconds are means over the ranks since the line before.

    time_s: of rank 0, at the very moment of its seconds, so that these add up to it.
    all_reduce_s: the part of the steps' seconds in which a rank waits for the exchange of gradients, mean over ranks.
    peak_memory: bytes, of the rank that needs most. compiled: whether blocks ran compiled.
    """
    reports = trainer.world.gather(trainer.ledger.since_last_report())
    time_s = trainer.ledger.reported_s
    peak_memory = max(trainer.world.gather(trainer.world.peak_memory()))
    exchange_s = trainer.world.gather(exchange_wait_s(trainer.state.parallel))
    cost, dense = trainer.resizer.now, trainer.resizer.dense
    return {
        "event": "epoch",
        "time_s": time_s,
        "epoch": epoch,
        "threshold": so_far.threshold,
        "flops_reduction": dense.flops / cost.flops,
        "macs_reduction": dense.macs / cost.macs,
        "flops": cost.flops,
        "macs": cost.macs,
        "params": cost.params,
        "widths": trainer.resizer.widths,
        "train_loss": loss,
        "top1": result.top1,
        "top5": result.top5,
        "lr": trainer.state.optimizer.param_groups[0]["lr"],
        "images_per_s": images_per_s,
        "skipped_steps": int(so_far.skipped),
        "compiled": trainer.progress.compiled,
        "seconds": {kind: sum(report[kind] for report in reports) / len(reports) for kind in reports[0]},
        "seconds_by_rank": reports,
        "all_reduce_s": None if None in exchange_s else sum(exchange_s) / len(exchange_s) * len(trainer.train_loader),
        "peak_memory": peak_memory,
        "gpu_hours": trainer.ledger.gpu_hours(time_s),
        "device": trainer.world.device.type,
    }


def _advance(progress: Progress, line: dict[str, Any]) -> bool:
    """Note that an epoch is finished; returns whether it is the best so far."""
    progress.epoch, progress.last_line = line["epoch"], line
    is_best = line["top1"] > progress.best_top1
    if is_best:
        progress.best_top1, progress.best_top5 = line["top1"], line["top5"]
    return is_best


def _closing_line(trainer: Trainer) -> dict[str, Any]:
    progress, dense = trainer.progress, trainer.resizer.dense
    seconds = trainer.ledger.seconds
    time_s = sum(seconds.values())
    keys = ("epoch", "flops_reduction", "macs_reduction", "flops", "macs", "params", "top1", "top5")
    return {
        "event": "done",
        "time_s": time_s,
        **{key: progress.last_line[key] for key in keys},
        "dense_flops": dense.flops,
        "dense_macs": dense.macs,
        "dense_params": dense.params,
        "best_top1": progress.best_top1,
        "best_top5": progress.best_top5,
        "resizes": progress.resizes,
        "steps": progress.step,
        "seconds": seconds,
        "gpu_hours": trainer.ledger.gpu_hours(time_s),
        "device": trainer.world.device.type,
    }
