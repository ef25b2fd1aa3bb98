"""The training loop.

    fit:
        for each epoch, or what is left of it after a resume:
            carry out what the method wants at its start                        # train/methods, train/resizer.py
            train_epoch: for each batch, mixup or cutmix, learning rate, forward, backward, step, EMA
            average batch-norm statistics over the ranks
            carry out what the method wants at its end
            evaluate                                                            # exact, padding counts for nothing
            write one epoch line, begin to save `last` (and `best`)
        wait until that is written, write the closing line

Between any two steps, of training or evaluation, the run may be saved, and may stop (watch.py).
Every function here is called by all ranks.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch

from cup import PrunePlan
from data import Batch
from train.errors import TrainError
from train.log.ledger import Kind
from train.loop.config import TrainConfig
from train.loop.evaluation import Evaluation, evaluate
from train.loop.nonfinite import AFTER_NONFINITE, AFTER_SKIPPING
from train.loop.pace import Moment, Pace
from train.loop.probe import batches_ahead, mean_loss
from train.loop.progress import EpochSoFar, Progress
from train.loop.step import training_step, warm_up_buckets
from train.loop.trainer import Trainer, TrainLoop
from train.methods import Action
from train.network.compiling import compile_errors
from train.network.optim import learning_rate, set_learning_rate
from train.resizer import Decide, Outcome
from train.world import all_reduce_wait_s

NOT_TRAINING = ("startup", "resize", "eval", "save", "lost")
"""Kinds of seconds of the ledger that images a second leave out."""


class Stopped(Exception):
    """A signal asked the run to stop; it was saved after its last step. Raised on all ranks."""


def fit(trainer: Trainer) -> dict[str, Any]:
    """Train from where `trainer.progress` stands to the last epoch; returns the closing event.

    Raises Stopped, after a checkpoint, if a signal asked for it.
    """
    for epoch in range(trainer.progress.epoch + 1, trainer.config.epochs + 1):
        if trainer.so_far is None:
            plan = _act(trainer, epoch, "start", partial(trainer.method.epoch_start, epoch))
            threshold = None if plan is None else plan.threshold
            trainer.so_far = EpochSoFar.beginning(trainer.ledger, trainer.world.device, threshold)
        loss, images_per_s, all_reduce_s = _train(trainer, epoch)
        with trainer.ledger.charge("eval"):
            _finish_training(trainer, epoch)
            result = _evaluate(trainer, epoch, trainer.state.eval_model)
            raw = None if trainer.state.ema is None else _evaluate(trainer, epoch, trainer.state.model)
        line = _epoch_event(trainer, epoch, trainer.so_far, loss, images_per_s, all_reduce_s, result, raw)
        trainer.so_far = None
        _finish_save(trainer)  # for it says which epoch is the best so far
        is_best = _advance(trainer.progress, line)
        trainer.sinks.write(line)
        with trainer.ledger.charge("save"):
            trainer.save(trainer, is_best)
        if epoch < trainer.config.epochs and trainer.watch.poll().stop:
            _finish_save(trainer)
            raise Stopped
    _finish_save(trainer)
    return _done_event(trainer)


def train_epoch(
    loop: TrainLoop,
    epoch: int,
    so_far: EpochSoFar,
    first_kind: Kind = "step",
    before_first_step: Callable[[Any], None] = lambda batch: None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """The rest of a pass over the training set.

    so_far: updated in place after every step. first_kind: what the first of these steps is charged to.
    before_first_step: is given the first batch. after_step: called between two steps.
    """
    state, steps = loop.state, len(loop.loader)
    state.parallel.train()
    modules = dict(state.model.named_modules())
    for name in loop.config.frozen:
        if name in modules:  # else it has gone with a dropped block
            modules[name].eval()
    loop.loader.go_to(epoch - 1, so_far.step)
    if loop.guard is not None:
        loop.guard.begin(state)
    if state.ema is not None:
        state.ema.begin()
    first_step, batches = so_far.step, iter(loop.loader)
    for step in range(first_step, steps):
        with loop.ledger.charge("data_wait"):
            batch = next(batches)
        kind: Kind = first_kind if step == first_step else "step"
        with loop.ledger.charge(kind), compile_errors() if kind == "compile" else nullcontext():
            lr = learning_rate(loop.optim, epoch - 1 + step / steps, loop.config.epochs)
            set_learning_rate(state.optimizer, lr)
            loop.method.before_step(state.model, epoch, step)
            if step == first_step:
                before_first_step(batch)
            images, labels = loop.mix(batch.images, batch.labels)
            loss = training_step(state, images, labels, loop.config, loop.guard, loop.method, loop.teacher)
            if loop.method.wants_loss:
                loop.method.saw_loss(loop.world.all_reduce(loss.clone()).item() / loop.world.size)
            if loop.guard is not None:
                loss = loop.guard.masked_loss(loss)
                so_far.skipped += loop.guard.found_inf
            so_far.loss_sum += loss
            if kind != "step":
                loop.world.synchronize()
        so_far.step += 1
        so_far.images += len(batch.labels) * loop.world.size
        after_step()


def _train(trainer: Trainer, epoch: int) -> tuple[float, float, float | None]:
    """What is left of the epoch's steps; returns (mean loss, images a second of all ranks, all_reduce_s of its event).

    The first two cover the whole epoch, steps before a resume included. Raises TrainError on all ranks for a mean loss
    that is not finite.
    """
    so_far, progress, steps = trainer.so_far, trainer.progress, len(trainer.loop.loader)
    just_resized = progress.just_resized
    compiles = False
    if not so_far.is_trained:
        progress.compiled, compiles = trainer.compiler.at_epoch_start(epoch, steps, just_resized, progress.compiled)
    # The first step after a resize builds DDP's buckets and picks kernels for the new shapes, one with other images the
    # latter alone.
    has_grown = so_far.step == 0 and epoch > 1 and trainer.image_size(epoch) != trainer.image_size(epoch - 1)
    first_kind: Kind = "compile" if compiles else "resize_warmup" if just_resized or has_grown else "step"
    last_eval_s = progress.last_line.get("seconds", {}).get("eval", 0.0)
    pace = Pace(trainer.config.epochs, steps, trainer.batch_size, so_far.step, last_eval_s)
    live = f"epoch {epoch}/{trainer.config.epochs}"

    def before_first_step(batch: Any) -> None:
        if trainer.is_resumed and trainer.world.size > 1 and progress.step != progress.wrapped_at:
            warm_up_buckets(trainer.state, batch, trainer.config, trainer.world)
        trainer.is_resumed = False

    def after_step() -> None:
        nonlocal live
        progress.step += 1
        loss = _poll(trainer, epoch)
        if loss is not None and trainer.world.is_main:
            reduction = trainer.resizer.reduction
            live = pace.text(Moment(epoch, so_far.step, reduction, trainer.image_size(epoch), loss))
        trainer.sinks.progress(live, so_far.step, steps)

    trainer.watch.restart()
    train_epoch(trainer.loop, epoch, so_far, first_kind, before_first_step, after_step)
    with trainer.ledger.charge("step"):
        loss = _mean_loss(trainer, epoch)
    spent = trainer.ledger.seconds
    training_s = sum(spent[kind] - so_far.seconds_before[kind] for kind in spent if kind not in NOT_TRAINING)
    return loss, so_far.images / training_s, _all_reduce_s(trainer)


def _all_reduce_s(trainer: Trainer) -> float | None:
    """Seconds of an epoch that a rank waits for the all-reduce, mean over ranks; asked before a cut wraps DDP anew."""
    wait_s = trainer.world.all_gather(all_reduce_wait_s(trainer.state.parallel))
    return None if None in wait_s else sum(wait_s) / len(wait_s) * len(trainer.loop.loader)


def _mean_loss(trainer: Trainer, epoch: int) -> float:
    so_far = trainer.so_far
    kept = so_far.step - so_far.skipped.item()
    loss_sum = trainer.world.all_reduce(so_far.loss_sum.clone()).item()
    loss = loss_sum / (kept * trainer.world.size) if kept else math.nan
    if math.isfinite(loss):
        return loss
    if trainer.loop.guard is not None and not kept:
        raise TrainError(
            f"all {so_far.step} steps of epoch {epoch} were left out, for their gradients were not finite: "
            f"{AFTER_SKIPPING}"
        )
    raise TrainError(f"the loss is {loss} in epoch {epoch}: {AFTER_NONFINITE}")


def _poll(trainer: Trainer, epoch: int) -> float | None:
    """After a step: save, stop or give up, if the ranks have agreed to.

    Returns at a look, which comes about once a second, the mean loss of this rank's steps of this epoch, up to the
    newest step that can be told of without waiting for the device; None where there is none, and between looks.
    Raises Stopped or TrainError on all ranks.
    """
    seen: tuple[list[float], tuple[int, int]] | None = None

    def is_broken() -> bool:
        nonlocal seen
        seen = trainer.readback.exchange(_vital_signs(trainer), (epoch, trainer.so_far.step))
        return seen is not None and _are_bad(seen[0], trainer.config)

    decision = trainer.watch.step(is_broken)
    if decision is None:
        return None
    broken = decision.broken
    if not broken and (decision.save or decision.stop):  # which waits for the device anyway
        [broken] = trainer.world.all_reduce_max([_are_bad(_vital_signs(trainer).tolist(), trainer.config)])
    if broken:
        raise TrainError(_diagnosis(trainer, epoch))
    if decision.saved:
        _finish_save(trainer)
    if decision.save or decision.stop:
        with trainer.ledger.charge("save"):
            trainer.save(trainer, False)
    if decision.stop:
        _finish_save(trainer)
        raise Stopped
    if seen is None:
        return None
    (loss_sum, *_), (seen_epoch, seen_step) = seen
    return loss_sum / seen_step if seen_epoch == epoch and seen_step else None


def _vital_signs(trainer: Trainer) -> torch.Tensor:
    """Sum of the epoch's losses so far, and with a guard the most steps left out in a row; float32, on the device."""
    guard = trainer.loop.guard
    signs = [trainer.so_far.loss_sum] if guard is None else [trainer.so_far.loss_sum, guard.longest]
    return torch.stack(signs)


def _are_bad(signs: list[float], config: TrainConfig) -> bool:
    """Whether training cannot go on from there."""
    loss_sum, *in_a_row = signs
    return in_a_row[0] >= config.nonfinite_limit if in_a_row else not math.isfinite(loss_sum)


def _diagnosis(trainer: Trainer, epoch: int) -> str:
    where = f"in epoch {epoch}, at or before step {trainer.so_far.step}"
    if trainer.loop.guard is not None:
        limit = trainer.config.nonfinite_limit
        return f"{limit} steps in a row were not finite {where} (train.nonfinite_limit): {AFTER_SKIPPING}"
    return f"the loss is not finite {where}: {AFTER_NONFINITE}"


def _finish_save(trainer: Trainer) -> None:
    with trainer.ledger.charge("save"):
        trainer.finish_save(trainer)


def _finish_training(trainer: Trainer, epoch: int) -> None:
    """What comes between an epoch's last step and its evaluation, once."""
    if trainer.so_far.is_trained:
        return
    state, world = trainer.state, trainer.world
    world.average_buffers(state.model)
    if state.ema is not None:
        world.average_buffers(state.ema)
        state.ema.copy_counters(state.model)
    _act(trainer, epoch, "end", partial(trainer.method.epoch_end, epoch))
    trainer.so_far.is_trained = True


def _evaluate(trainer: Trainer, epoch: int, model: torch.nn.Module) -> Evaluation:
    trainer.watch.restart()
    with trainer.compiler.paused():
        return evaluate(
            model, trainer.val_loader, trainer.state.precision, trainer.world, lambda: _poll(trainer, epoch)
        )


def _act(trainer: Trainer, epoch: int, when: Literal["start", "end"], decide: Decide) -> PrunePlan | None:
    """Carry out what the method decides at the start or the end of an epoch, and write it; returns the plan, if any."""
    ledger = trainer.ledger
    started = ledger.seconds["resize"]
    with ledger.charge("resize"):
        action = trainer.resizer.ask(decide, trainer.state, trainer.world)
        if action is None:
            return None
        if not action.plan.changes_nothing:
            next_epoch = epoch - 1 if when == "start" else epoch
            with batches_ahead(trainer.loop.loader, next_epoch, 0) as batches:
                outcome, losses = _carry_out(trainer, action, batches)
        trainer.world.synchronize()
    seconds = ledger.seconds["resize"] - started
    plan = action.plan
    if plan.note:
        trainer.sinks.note(plan.note, ledger.total_s)
    if plan.dropped:
        trainer.sinks.note(f"epoch {epoch}: blocks dropped: {', '.join(plan.dropped)}", ledger.total_s)
    if plan.changes_nothing:
        at = "" if plan.threshold is None else f" at t {plan.threshold:.3f}"
        trainer.sinks.note(f"epoch {epoch}: a cut{at} removes nothing", ledger.total_s)
        return plan
    trainer.sinks.write(
        {
            "event": "zero" if action.soft else "resize",
            "time_s": ledger.total_s,
            "epoch": epoch,
            "when": when,
            "step": trainer.progress.step,
            "threshold": plan.threshold,
            "flops_reduction_before": outcome.reduction_before,
            "flops_reduction_after": outcome.reduction_after,
            "removed": outcome.removed,
            "loss_before": losses[0],
            "loss_after": losses[1],
            "seconds": seconds,
            "digest": outcome.digests[0],
            "digests": outcome.digests,
        }
    )
    return plan


def _carry_out(
    trainer: Trainer, action: Action, batches: Iterator[Batch]
) -> tuple[Outcome, tuple[float | None, float | None]]:
    """Carry out what removes or zeroes channels; returns what it did, and the loss before and after it.

    batches: the training batches that come next, taken from but not used up. A loss that is not finite is None.
    """
    # A copy, for the loader may overwrite it. An image that one rank cannot read ends all ranks.
    first = trainer.world.on_every_rank(lambda: Batch(*(part.clone() for part in next(batches))))

    def loss() -> float | None:
        with trainer.ledger.charge("eval"), trainer.compiler.paused():
            found = mean_loss(trainer.state.model, first, trainer.state.precision, trainer.world)
        return found if math.isfinite(found) else None

    before = loss()
    outcome = trainer.resizer.carry_out(action, trainer.state, trainer.world)
    view = trainer.resizer.view(trainer.state.model)
    trainer.world.on_every_rank(lambda: trainer.method.after_action(action, view))
    if not action.soft:
        trainer.progress.resizes += 1
        trainer.progress.wrapped_at = trainer.progress.step
    return outcome, (before, loss())


def _epoch_event(
    trainer: Trainer,
    epoch: int,
    so_far: EpochSoFar,
    loss: float,
    images_per_s: float,
    all_reduce_s: float | None,
    result: Evaluation,
    raw: Evaluation | None,
) -> dict[str, Any]:
    """The epoch event. All ranks call it: it gathers their seconds since the event before.

    raw: of the weights themselves where `result` is their moving average's.
    seconds: means over the ranks. time_s: of rank 0 at the moment of its own seconds, `seconds_by_rank[0]`, which
    add up to it over the events.
    step_speedup: of a training step over the full network's, as modelled; None where no cost model is asked for.
    all_reduce_s: the part of the steps' seconds in which a rank waits for the all-reduce of gradients, mean over ranks.
    peak_memory: bytes, of the rank that needs most. device_memory: bytes of a GPU in use at the end, with what the
    allocator keeps, DALI, NCCL and others have; of the rank with most, None on a CPU.
    compiled: whether blocks ran compiled.
    """
    reports = trainer.world.all_gather(trainer.ledger.since_last_report())
    time_s = trainer.ledger.reported_s
    held = trainer.world.all_gather([trainer.world.device_memory() or 0, trainer.world.peak_memory()])
    device_memory, peak_memory = map(max, zip(*held, strict=True))
    cost, dense = trainer.resizer.now, trainer.resizer.dense
    return {
        "event": "epoch",
        "time_s": time_s,
        "epoch": epoch,
        "threshold": so_far.threshold,
        "flops_reduction": dense.flops / cost.flops,
        "macs_reduction": dense.macs / cost.macs,
        "step_speedup": trainer.resizer.speedup(trainer.state.model),
        "flops": cost.flops,
        "macs": cost.macs,
        "params": cost.params,
        "widths": trainer.resizer.widths,
        "train_loss": loss,
        "top1": result.top1,
        "top5": result.top5,
        "raw_top1": None if raw is None else raw.top1,
        "raw_top5": None if raw is None else raw.top5,
        "lr": trainer.state.optimizer.param_groups[0]["lr"],
        "images_per_s": images_per_s,
        "image_size": trainer.image_size(epoch),
        "skipped_steps": int(so_far.skipped),
        "compiled": trainer.progress.compiled,
        "seconds": {kind: sum(report[kind] for report in reports) / len(reports) for kind in reports[0]},
        "seconds_by_rank": reports,
        "all_reduce_s": all_reduce_s,
        "peak_memory": peak_memory,
        "device_memory": device_memory or None,
        "gpu_hours": trainer.ledger.gpu_hours(time_s),
        "cpu_seconds": _cpu_seconds(trainer),
        "device": trainer.world.device.type,
    }


def _cpu_seconds(trainer: Trainer) -> float | None:
    """Of all ranks, since the run began; None for a run that an earlier version began. All ranks call it."""
    counted = trainer.world.all_gather(trainer.ledger.cpu_s)
    return None if None in counted else sum(counted)


def _advance(progress: Progress, line: dict[str, Any]) -> bool:
    """Note that an epoch is finished; returns whether it is the best so far."""
    progress.epoch, progress.last_line = line["epoch"], line
    is_best = line["top1"] > progress.best_top1
    if is_best:
        progress.best_top1, progress.best_top5 = line["top1"], line["top5"]
    return is_best


def _done_event(trainer: Trainer) -> dict[str, Any]:
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
        "cpu_seconds": _cpu_seconds(trainer),
        "device": trainer.world.device.type,
    }
