"""One run from its configuration: builds everything in order, trains, closes."""

import dataclasses
import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cup import REDUCTION_TOLERANCE, Complexity, complexity, has_reached
from data import DataConfig, Loader, build_loaders, prepare_data, train_size
from data.batch import Split
from data.images import SPLITS, exclude_file
from train.checkpoint.file import (
    StoredNetwork,
    load_checkpoint,
    load_network,
    load_weights,
    put_aside,
    stored_architecture,
    stored_plans,
    stored_weights,
)
from train.checkpoint.saving import Saver, load_stored, lost_seconds, restore, restore_buffers
from train.config import RunConfig, config_from_dict
from train.errors import ConfigError, TrainError
from train.log.ledger import Ledger
from train.log.sinks import ConsoleSink, JsonLines, Sinks, TensorBoard
from train.loop.engine import Evaluation, Progress, Stopped, Trainer, evaluate, fit
from train.loop.mixing import build_mixing
from train.loop.nonfinite import StepGuard
from train.loop.watch import Watch
from train.network.compiling import BlockCompiler
from train.network.models import Architecture, build_model
from train.network.optim import build_optimizer
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT, TrainState, state_digest
from train.resizer import Resizer
from train.rundir import RunDir, create_run_dir, find_run_dir, read_log
from train.signals import StopSignals
from train.world import World, torchrun_job

OWN_SIGNAL_WITHIN_S = 5.0


def run(config: RunConfig, world: World, ledger: Ledger) -> dict[str, Any]:
    """Train as `config` says; returns the closing event, or an event `stopped` if a signal asked for it.

    All ranks call it. Raises train/world.py's USER_ERRORS.
    """
    run_dir = RunDir(Path(world.on_rank_zero(lambda: str(find_run_dir(config, torchrun_job()).path))))
    if done := world.on_rank_zero(run_dir.closing_event):  # torchrun restarts a job that failed after its end
        if world.is_main:
            ConsoleSink().write({"event": "note", "message": f"{run_dir.path} is finished, by this very job"})
        return done
    stored, damaged, notes = load_stored(run_dir, world)
    source = _load_source(config, world) if stored is None else None
    config = _with_model_name(config, stored or source)
    world.on_rank_zero(lambda: prepare_data(config.data))
    fitted, words = _fitted(config, world, goes_on=world.on_rank_zero(run_dir.config.exists))
    trainer = world.together(lambda: _build_trainer(fitted, world, ledger))
    notes += words + config.without_effect() + _left_out(config, trainer)
    if stored is not None:
        notes += world.together(lambda: restore(trainer, stored, fitted.data.batch_size))
    elif source is not None:
        notes += world.together(lambda: _start_from(trainer, source, config))
    notes += trainer.resizer.measure_widths(trainer.state, fitted.data.batch_size // world.size, world)
    ledger.add_lost(**world.on_rank_zero(lambda: lost_seconds(run_dir, stored)))
    # Only now, so that a run that cannot start leaves no directory that the corrected one would stumble over.
    world.on_rank_zero(lambda: create_run_dir(run_dir, config))
    _check_equal(trainer.state, world)
    if stored is not None:
        restore_buffers(trainer, stored)
    trainer.state.parallel = world.wrap(trainer.state.model)
    architecture = _architecture(config, trainer.train_loader.num_classes)
    saver = Saver(config, run_dir, architecture, fitted.data.batch_size, trainer.progress)
    trainer.save = saver.save
    trainer.sinks, words = world.together(lambda: _open_sinks(run_dir, world, ledger, stored))
    notes += words
    world.on_rank_zero(lambda: put_aside(damaged))  # the log is ours alone by now
    with StopSignals(is_speaker=world.is_main) as signals:
        beat = (lambda: saver.beat(ledger)) if world.is_main else (lambda: None)
        trainer.watch = Watch(world, lambda: signals.stop_wanted, 60 * config.run.save_every_minutes, beat)
        beat()  # a kill from here on is in the account
        try:
            trainer.sinks.write(_first_line(fitted, trainer, run_dir))
            for note in notes:
                trainer.sinks.write({"event": "note", "time_s": ledger.total_s, "message": note})
            ledger.end_startup()
            done = {**fit(trainer), "directory": str(run_dir.path)}
            world.on_rank_zero(lambda: _close(trainer, saver, run_dir, done))
            return done
        except Stopped:
            _require_saved(saver, run_dir)
            _await_own_signal(signals)
            return _stopped_event(trainer, run_dir)
        except BaseException:  # whatever it was: the wait for a rank that is gone may have taken minutes
            if world.is_main:
                saver.beat(ledger, at_once=True)
            raise
        finally:
            trainer.sinks.close()
            trainer.train_loader.close()
            trainer.val_loader.close()


def evaluate_checkpoint(
    path: Path, world: World, data_path: str | None = None, batch_size: int | None = None
) -> tuple[Evaluation, Complexity]:
    """Exact accuracy of the stored network at its stored widths, and its cost. All ranks call it.

    data_path, batch_size: in place of the run's own. Raises train/world.py's USER_ERRORS.
    """
    stored = world.together(lambda: load_network(path))
    architecture, model = stored.architecture, stored.model
    config = _evaluation_config(path, stored, {"path": data_path, "batch_size": batch_size})
    [val_loader] = world.together(lambda: _loaders(config, world, ("val",)))
    if val_loader.num_classes != architecture.num_classes:
        raise TrainError(
            f"{config.data.path} has {val_loader.num_classes} classes, the network {architecture.num_classes}"
        )
    notes = [*_unmatched(config, val_loader), *_passed_over(config, {"validation": val_loader})]
    if val_loader.num_excluded:
        notes.append(f"{config.data.path}: {val_loader.num_excluded} validation images are excluded and not counted")
    for note in notes if world.is_main else ():
        warnings.warn(note, stacklevel=2)
    model.to(world.device, memory_format=MEMORY_FORMAT)
    try:
        result = evaluate(model, val_loader, Precision(config.train.precision, world.device), world)
    finally:
        val_loader.close()
    return result, complexity(model, architecture.example_input())


def _evaluation_config(path: Path, stored: StoredNetwork, data_changes: dict[str, Any]) -> RunConfig:
    """What decides an evaluation: the run's own settings, or the usual ones where no run trained the weights."""
    changes = {key: value for key, value in data_changes.items() if value is not None}
    if stored.config is not None:
        config = config_from_dict(stored.config)
    elif "path" in changes:
        channels, side, _ = stored.architecture.input_shape
        # ImageNet's custom: the centre 224 of 256 pixels; small images have no margin to spare.
        margin = side // 7 if side >= 224 else 0
        config = RunConfig(data=DataConfig(channels=channels, image_size=side, resize_size=side + margin))
    else:
        raise ConfigError(
            f"{path} was made from published weights, and no run says on which images: give --data FOLDER"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def _load_source(config: RunConfig, world: World) -> dict[str, Any] | None:
    """The checkpoint that a new run starts from, on every rank; None for one from scratch."""
    if config.model.from_ is None:
        return None
    return world.together(lambda: load_checkpoint(Path(config.model.from_)))


def _with_model_name(config: RunConfig, begun: dict[str, Any] | None) -> RunConfig:
    """The configuration with the name of the network that a checkpoint holds, where there is one to go on from."""
    if begun is None:
        return config
    name = stored_architecture(begun).name
    if config.model.name not in (None, name):
        raise ConfigError(
            f"model.name: found {config.model.name}, but {config.model.from_} holds {name}; allowed: {name}, or "
            "null, which takes what the file holds"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))


def _build_trainer(config: RunConfig, world: World, ledger: Ledger) -> Trainer:
    """Everything at full width and at the beginning; DDP, sinks and checkpoints not yet."""
    train_loader, val_loader = _loaders(config, world, SPLITS)
    torch.manual_seed(config.run.seed)  # the same initial weights on every rank
    on_gpu = world.device.type == "cuda"
    architecture = _architecture(config, train_loader.num_classes)
    model = build_model(architecture.name, architecture.num_classes)
    resizer = Resizer(config.cup, model, architecture.example_input(), config.train.epochs)
    if config.data.start_size:  # says so if the network does not take the smallest images
        start = train_size(config.data, 0)
        smallest = dataclasses.replace(architecture, input_shape=(config.data.channels, start, start))
        complexity(model, smallest.example_input())
    model.to(world.device, memory_format=MEMORY_FORMAT)
    torch.manual_seed(config.run.seed + world.rank)  # dropout differs between ranks
    torch.backends.cudnn.benchmark = on_gpu
    ema = None
    if config.train.ema_decay > 0:
        average = get_ema_multi_avg_fn(config.train.ema_decay)
        ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    precision = Precision(config.train.precision, world.device)
    optimizer = build_optimizer(model, config.optim)
    return Trainer(
        config=config.train,
        optim=config.optim,
        world=world,
        train_loader=train_loader,
        val_loader=val_loader,
        compiler=BlockCompiler(
            model,
            enabled=config.train.compile == "blocks",
            enough_steps=config.train.compile_steps,
            epochs=config.train.epochs,
            may_cut=resizer.may_cut,
            image_side=lambda epoch: train_size(config.data, max(epoch, 1) - 1),
        ),
        mix=build_mixing(config.train.mixup, config.train.cutmix, train_loader.num_classes),
        state=TrainState(model, model, optimizer, precision, ema),
        resizer=resizer,
        ledger=ledger,
        sinks=Sinks([]),
        progress=Progress(),
        watch=Watch(world, lambda: False),
        guard=StepGuard(world.device) if config.train.nonfinite == "skip" else None,
    )


def _fitted(config: RunConfig, world: World, goes_on: bool) -> tuple[RunConfig, list[str]]:
    """The configuration for this number of ranks, and words for the user.

    A run that goes on with another number of ranks keeps its batch, so steps and learning rate stay. Where the ranks
    cannot share it, the batch becomes the next smaller one that they can, and the learning rate goes down with it.
    A run that begins is refused in that case (data/sharding.py).
    """
    batch_size = config.data.batch_size
    fitting = batch_size // world.size * world.size
    if not goes_on or fitting in (0, batch_size):
        return config, []
    lr = config.optim.lr * fitting / batch_size
    words = (
        f"{world.size} ranks cannot share batches of {batch_size} images: going on with {fitting}, and "
        f"optim.lr {lr:g} in place of {config.optim.lr:g}"
    )
    data, optim = (
        dataclasses.replace(config.data, batch_size=fitting),
        dataclasses.replace(config.optim, lr=lr),
    )
    return dataclasses.replace(config, data=data, optim=optim), [words]


def _architecture(config: RunConfig, num_classes: int) -> Architecture:
    side = config.data.image_size
    return Architecture(name=config.model.name, num_classes=num_classes, input_shape=(config.data.channels, side, side))


def _loaders(config: RunConfig, world: World, splits: Sequence[Split]) -> list[Loader]:
    return build_loaders(
        config.data,
        rank=world.rank,
        world_size=world.size,
        local_world_size=world.local_size,
        device=world.device,
        seed=config.run.seed,
        splits=splits,
    )


def _left_out(config: RunConfig, trainer: Trainer) -> list[str]:
    """What of the data set is not trained on or not evaluated on, in words for the user."""
    train, val = trainer.train_loader.num_excluded, trainer.val_loader.num_excluded
    listed = exclude_file(config.data.path, config.data.exclude)
    notes = [f"{listed} leaves out {train} training and {val} validation images"] if train or val else []
    splits = {"training": trainer.train_loader, "validation": trainer.val_loader}
    return [*notes, *_unmatched(config, trainer.train_loader), *_passed_over(config, splits)]


def _unmatched(config: RunConfig, loader: Loader) -> list[str]:
    """What the exclude list names without effect, in words for the user."""
    names, listed = loader.unmatched, exclude_file(config.data.path, config.data.exclude)
    note = f"{listed} names what is not in the data set, expected SPLIT/CLASS/FILE or SPLIT/CLASS/: {_some(names)}"
    return [note] if names else []


def _passed_over(config: RunConfig, splits: dict[str, Loader]) -> list[str]:
    """What no loader takes for an image, in words for the user."""
    return [
        f"{config.data.path}: not among the {split} images, for its name or place: {_some(loader.passed_over)}"
        for split, loader in splits.items()
        if loader.passed_over
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_equal(state: TrainState, world: World) -> None:
    """Before DDP is wrapped, which would not notice: all ranks start from the same bits."""
    digests = world.gather(state_digest(state))
    if len(set(digests)) > 1:
        raise TrainError(f"the ranks do not start from equal weights ({digests}): do all run the same versions?")


def _start_from(trainer: Trainer, source: dict[str, Any], config: RunConfig) -> list[str]:
    """Bring a fresh trainer to the widths and weights of a checkpoint; everything else begins anew.

    FR stays measured against the full network, for the cuts that led to the widths are replayed. Returns words for the
    user.
    """
    architecture, classes = stored_architecture(source), trainer.train_loader.num_classes
    if architecture.num_classes != classes:
        raise ConfigError(
            f"model.from: {config.model.from_} tells {architecture.num_classes} classes apart, the data set has "
            f"{classes}; allowed: equal numbers, for the classifier is trained further"
        )
    state, resizer, target = trainer.state, trainer.resizer, config.cup.target_reduction
    resizer.replay(state, stored_plans(source))
    load_weights(state.model, stored_weights(source))  # a moving average begins as a copy, at the first step
    trainer.progress.gpu_hours_before = source["gpu_hours"]
    notes = [f"starts from {config.model.from_}: {architecture.name} at FR {resizer.reduction:.2f}"]
    if config.cup.enabled and target is not None and has_reached(resizer.reduction, target, REDUCTION_TOLERANCE):
        notes.append(f"cup.target_reduction {target:g} is reached already: nothing more will be cut")
    return notes


def _open_sinks(
    run_dir: RunDir, world: World, ledger: Ledger, stored: dict[str, Any] | None
) -> tuple[Sinks, list[str]]:
    """Rank 0's sinks, going on where the checkpoint was written, none on the other ranks; and words for the user."""
    if not world.is_main:
        return Sinks([]), []
    try:
        log = JsonLines(run_dir.log, keep_bytes=0 if stored is None else stored["log_bytes"])
    except OSError as error:
        raise TrainError(f"cannot write in {run_dir.path}: {error.strerror}") from error
    try:
        curves = [TensorBoard(run_dir.tensorboard, time.time() - ledger.total_s, read_log(run_dir.log))]
        words = []
    except Exception as error:  # a view of the log: training goes on without it, whatever it is
        curves, words = [], [f"{run_dir.tensorboard} cannot be written and is left out: {error}"]
    return Sinks([log, *curves, ConsoleSink()], log), words


def _close(trainer: Trainer, saver: Saver, run_dir: RunDir, done: dict[str, Any]) -> None:
    """Write the closing line, by which a run counts as finished; TrainError if anything is missing. Rank 0 only."""
    _require_saved(saver, run_dir)
    trainer.sinks.write(done)
    if trainer.sinks.unwritten:
        raise TrainError(
            f"trained to the end, but {trainer.sinks.unwritten} lines of {run_dir.log} could not be written; "
            f"{run_dir.last} is complete, and the same command closes the run once there is room"
        )
    with suppress(OSError):  # the run is finished all the same
        run_dir.alive.unlink(missing_ok=True)


def _require_saved(saver: Saver, run_dir: RunDir) -> None:
    if saver.failure:
        raise TrainError(
            f"the run is not saved as it stands: {saver.failure}; the same command goes on from the checkpoint in "
            f"{run_dir.path}, if there is one"
        )


def _await_own_signal(signals: StopSignals) -> None:
    """Let torchrun signal this rank, too, before it ends.

    When machines come or go, each torchrun stops its own ranks, which stop all of them. Ranks that end well before
    their own torchrun has asked them to would look to it like the end of the whole job.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID") is not None:
        signals.wait(OWN_SIGNAL_WITHIN_S)


def _stopped_event(trainer: Trainer, run_dir: RunDir) -> dict[str, Any]:
    step = 0 if trainer.so_far is None else trainer.so_far.step
    return {"event": "stopped", "epoch": trainer.progress.epoch + 1, "step": step, "directory": str(run_dir.path)}


def _first_line(config: RunConfig, trainer: Trainer, run_dir: RunDir) -> dict[str, Any]:
    world, dense = trainer.world, trainer.resizer.dense
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine() + " CPU"
    return {
        "event": "run",
        "time_s": trainer.ledger.total_s,
        "directory": str(run_dir.path),
        "config_digest": hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest(),
        "config": config.to_dict(),
        "model": config.model.name,
        "from": config.model.from_,
        "gpu_hours_before": trainer.progress.gpu_hours_before,
        "cup": config.cup.enabled,
        "epochs": config.train.epochs,
        "first_epoch": trainer.progress.epoch + 1,
        "first_step": 0 if trainer.so_far is None else trainer.so_far.step,
        "job": torchrun_job(),
        "batch_size": config.data.batch_size,
        "precision": config.train.precision,
        "loader": trainer.train_loader.kind,
        "world_size": world.size,
        "devices": world.gather(device),
        "device": world.device.type,
        "versions": {"python": platform.python_version(), **_versions("torch", "torchvision", "nvidia-dali-cuda130")},
        "train_images": trainer.train_loader.num_images,
        "val_images": trainer.val_loader.num_images,
        "dense_flops": dense.flops,
        "dense_macs": dense.macs,
        "dense_params": dense.params,
    }


def _versions(*packages: str) -> dict[str, str]:
    """Package -> version, for those that are installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
