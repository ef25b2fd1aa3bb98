"""One run from its configuration: builds everything in order, trains, closes."""

import dataclasses
import hashlib
import json
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cup import REDUCTION_TOLERANCE, Complexity, complexity, has_reached
from data import DataConfig, DataError, Loader, build_loaders, prepare_data, train_size
from data.images import exclude_file
from train.checkpoint import (
    CheckpointError,
    StoredNetwork,
    load_checkpoint,
    load_network,
    load_weights,
    plans_to_store,
    save_checkpoint,
    stored_architecture,
    stored_plans,
    stored_weights,
)
from train.compiling import BlockCompiler
from train.config import RunConfig, config_from_dict
from train.engine import Evaluation, Progress, Trainer, evaluate, fit
from train.errors import ConfigError, TrainError
from train.ledger import Ledger
from train.mixing import build_mixing
from train.models import Architecture, build_model
from train.optim import build_optimizer
from train.precision import Precision
from train.resize import Resizer
from train.rundir import RunDir, create_run_dir, find_run_dir
from train.sinks import ConsoleSink, JsonLines, Sinks, TensorBoard
from train.state import MEMORY_FORMAT, TrainState, state_digest
from train.world import World


def run(config: RunConfig, world: World, ledger: Ledger) -> dict[str, Any]:
    """Train as `config` says; returns the closing event. All ranks call it. Raises train/world.py's USER_ERRORS."""
    run_dir = RunDir(Path(world.on_rank_zero(lambda: str(find_run_dir(config).path))))
    stored = _load_stored(run_dir, world)
    source = _load_source(config, world) if stored is None else None
    config = _with_model_name(config, stored or source)
    world.on_rank_zero(lambda: prepare_data(config.data))
    trainer = world.together(lambda: _build_trainer(config, world, ledger))
    notes = config.without_effect() + _excluded(config, trainer)
    if stored is not None:
        notes += world.together(lambda: _restore(trainer, stored))
    elif source is not None:
        notes += world.together(lambda: _start_from(trainer, source, config))
    notes += trainer.resizer.measure_widths(trainer.state, config.data.batch_size // world.size, world)
    # Only now, so that a run that cannot start leaves no directory that the corrected one would stumble over.
    world.on_rank_zero(lambda: create_run_dir(run_dir, config))
    trainer.save = lambda trainer, is_best: _save(config, trainer, run_dir, is_best)
    _check_equal(trainer.state, world)
    trainer.state.parallel = world.wrap(trainer.state.model)
    trainer.sinks = world.together(lambda: _open_sinks(run_dir, world, trainer.progress, stored))
    try:
        trainer.sinks.write(_first_line(config, trainer, run_dir))
        for note in notes:
            trainer.sinks.write({"event": "note", "time_s": ledger.total_s, "message": note})
        ledger.end_startup()
        done = {**fit(trainer), "directory": str(run_dir.path)}
        trainer.sinks.write(done)
        return done
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
    _, val_loader = world.together(lambda: _loaders(config, world))
    if val_loader.num_classes != architecture.num_classes:
        raise TrainError(
            f"{config.data.path} has {val_loader.num_classes} classes, the network {architecture.num_classes}"
        )
    notes = _unmatched(config, val_loader)
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
    train_loader, val_loader = _loaders(config, world)
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
    )


def _architecture(config: RunConfig, num_classes: int) -> Architecture:
    side = config.data.image_size
    return Architecture(name=config.model.name, num_classes=num_classes, input_shape=(config.data.channels, side, side))


def _loaders(config: RunConfig, world: World) -> tuple[Loader, Loader]:
    return build_loaders(
        config.data,
        rank=world.rank,
        world_size=world.size,
        local_world_size=world.local_size,
        device=world.device,
        seed=config.run.seed,
    )


def _excluded(config: RunConfig, trainer: Trainer) -> list[str]:
    """What the exclude list takes out of the data set, in words for the user."""
    train, val = trainer.train_loader.num_excluded, trainer.val_loader.num_excluded
    listed = exclude_file(config.data.path, config.data.exclude)
    notes = [f"{listed} leaves out {train} training and {val} validation images"] if train or val else []
    return notes + _unmatched(config, trainer.train_loader)


def _unmatched(config: RunConfig, loader: Loader) -> list[str]:
    """What the exclude list names without effect, in words for the user."""
    names, listed = loader.unmatched, exclude_file(config.data.path, config.data.exclude)
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    note = f"{listed} names what is not in the data set, expected SPLIT/CLASS/FILE or SPLIT/CLASS/: {named}"
    return [note] if names else []


def _check_equal(state: TrainState, world: World) -> None:
    """Before DDP is wrapped, which would not notice: all ranks start from the same bits."""
    digests = world.gather(state_digest(state))
    if len(set(digests)) > 1:
        raise TrainError(f"the ranks do not start from equal weights ({digests}): do all run the same versions?")


def _save(config: RunConfig, trainer: Trainer, run_dir: RunDir, is_best: bool) -> None:
    """Write `last`, and `best` where it is. All ranks call it: each gives its own random state and loader position."""
    world, state, before = trainer.world, trainer.state, trainer.progress.gpu_hours_before
    ranks = world.gather(
        {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None,
            "train_loader": trainer.train_loader.state_dict(),
            "val_loader": trainer.val_loader.state_dict(),
            "ledger": trainer.ledger.state_dict(),
        }
    )

    def write() -> None:
        content = {
            "architecture": dataclasses.asdict(_architecture(config, trainer.train_loader.num_classes)),
            "config": config.to_dict(),
            "plans": plans_to_store(trainer.resizer.plans),
            "widths": trainer.resizer.widths,
            "allowed_widths": trainer.resizer.allowed_widths,
            "progress": vars(trainer.progress),
            "gpu_hours": None if before is None else before + trainer.ledger.gpu_hours(trainer.ledger.total_s),
            "log_bytes": trainer.sinks.log_bytes,
            "model": state.model.state_dict(),
            "ema": None if state.ema is None else state.ema.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.precision.scaler.state_dict(),
            "ranks": ranks,
        }
        if is_best:
            save_checkpoint(run_dir.best, content)
        save_checkpoint(run_dir.last, content)

    world.together(write if world.is_main else lambda: None)


def _load_stored(run_dir: RunDir, world: World) -> dict[str, Any] | None:
    """The checkpoint to go on from, on every rank; None for a run that begins."""
    if not world.on_rank_zero(run_dir.last.exists):
        return None
    try:
        return world.together(lambda: load_checkpoint(run_dir.last))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it to start this run over, or take --run.resume never") from error


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


def _restore(trainer: Trainer, stored: dict[str, Any]) -> list[str]:
    """Bring a fresh trainer to where the checkpoint was written: widths first, then everything that has them.

    Returns what could not be restored and changes nothing but the random numbers, in words for the user.
    """
    state, world = trainer.state, trainer.world
    trainer.resizer.replay(state, stored_plans(stored))
    trainer.resizer.allowed_widths = stored.get("allowed_widths")
    try:
        state.model.load_state_dict(stored["model"])
        if state.ema is not None:
            state.ema.load_state_dict(stored["ema"])
        state.optimizer.load_state_dict(stored["optimizer"])
        state.precision.scaler.load_state_dict(stored["scaler"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the stored state does not fit this network: {error}") from error
    trainer.progress = Progress(**stored["progress"])
    ranks = stored["ranks"]
    trainer.ledger.load_state_dict(ranks[min(world.rank, len(ranks) - 1)]["ledger"])
    if len(ranks) != world.size:
        return [f"resumed on {world.size} ranks, stored by {len(ranks)}: augmentation and dropout draw other numbers"]
    mine = ranks[world.rank]
    torch.set_rng_state(mine["rng"])
    if mine["cuda_rng"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda_rng"], world.device)
    try:
        trainer.train_loader.load_state_dict(mine["train_loader"])
        trainer.val_loader.load_state_dict(mine["val_loader"])
    except DataError as error:  # another loader or DALI version: the epoch's order is the same, its crops are not
        return [f"augmentation draws other numbers than before: {error}"]
    return []


def _open_sinks(run_dir: RunDir, world: World, progress: Progress, stored: dict[str, Any] | None) -> Sinks:
    """Rank 0's sinks, going on where the checkpoint was written; none on the other ranks."""
    if not world.is_main:
        return Sinks([])
    try:
        log = JsonLines(run_dir.log, keep_bytes=0 if stored is None else stored["log_bytes"])
        return Sinks([log, TensorBoard(run_dir.tensorboard, from_epoch=progress.epoch + 1), ConsoleSink()], log)
    except OSError as error:
        raise TrainError(f"cannot write in {run_dir.path}: {error.strerror}") from error


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
    return {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in packages}
