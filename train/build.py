"""From a configuration and a start to a trainer that is complete."""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cup import DEVICES, ChannelGroup, Device, complexity, device_cost, named_device, prunable_groups
from data import Loader, prepare_data, train_size
from data.batch import preprocessing_of
from data.images import SPLITS, exclude_file
from train.checkpoint.file import load_checkpoint, put_aside
from train.checkpoint.network import (
    refuse_pruning_net,
    stored_architecture,
    stored_plans,
    stored_preprocessing,
    stored_weights,
)
from train.checkpoint.restore import Restored, load_run, restore, restore_method, restore_running_statistics
from train.checkpoint.saver import Saver, plain_state
from train.checkpoint.weights import load_weights
from train.config import RunConfig
from train.config_file import create_run_dir
from train.errors import ConfigError, TrainError
from train.files import why_unwritten
from train.loaders import Listed, build_split_loaders, list_once
from train.log.ledger import Ledger
from train.log.mending import lines_of_checkpoint
from train.log.rundir import read_log
from train.log.sinks import ConsoleSink, JsonLines, Sinks
from train.log.trackers import TRACKERS, Tracked, require_installed
from train.loop.mixing import build_mixing
from train.loop.nonfinite import StepGuard
from train.loop.progress import Progress
from train.loop.readback import Readback
from train.loop.teacher import load_teacher
from train.loop.trainer import Trainer, TrainLoop
from train.loop.watch import Watch
from train.methods import Method, PruneConfig, build_method
from train.methods.landing import has_landed
from train.narrowing import plan_narrowing
from train.network.calibration import known_device, measured_device
from train.network.compiling import BlockCompiler, repeated_blocks
from train.network.ema import MovingAverage
from train.network.models import Architecture, build_model
from train.network.optim import build_optimizer
from train.network.own import check_own, is_factory, shrinking_note
from train.network.precision import Precision
from train.network.pruning_net import PruningNet, widths_at_scales
from train.network.state import MEMORY_FORMAT, TrainState, state_digest
from train.network.widths import NOISE, AllowedWidths, measured_widths
from train.preprocessing import images_note, own_preprocessing, settled
from train.resizer import Resizer
from train.start import Start
from train.weights import GivenWeights, classifier_names, read_given, start_from_weights
from train.world import World


@dataclass(frozen=True)
class Run:
    """A run that is ready to train, on one rank.

    config: as fitted to this number of ranks. notes: messages for the user.
    """

    config: RunConfig
    trainer: Trainer
    saver: Saver
    notes: list[str]


@dataclass(frozen=True)
class _Parts:
    """What is at full width and at its beginning, before anything is restored."""

    architecture: Architecture
    train_loader: Loader
    val_loader: Loader
    resizer: Resizer
    state: TrainState
    repeated: list[nn.Module]
    """The network's repeated blocks, which compiling is about."""


def build_run(config: RunConfig, start: Start, world: World, ledger: Ledger, stop_wanted: Callable[[], bool]) -> Run:
    """Build everything in the order in which things need each other. All ranks call it.

    stop_wanted: asked between steps. What can fail because of the user's doing comes before the run directory is made,
    so that a run that cannot start leaves none that the corrected one would stumble over. Raises train/world.py's
    USER_ERRORS.
    """
    world.on_rank_zero(lambda: require_installed(config.run.trackers))
    stored, source = _load(config, start, world)
    given = None if stored else _given_weights(config, world)
    config = _with_model_name(config, stored or source, start.checkpoint or config.model.checkpoint)
    if given is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=given.name))
    world.on_rank_zero(lambda: prepare_data(config.data))
    fitted, fitting_notes = _fitted(config, world, start.has_run)
    fitted, image_notes = _with_preprocessing(fitted, stored, source, given)
    classes = (stored or source or {}).get("classes")
    listed = list_once(fitted.data, world, SPLITS, classes)
    parts = world.on_every_rank(lambda: _build_parts(fitted, world, classes, listed))
    begun = world.on_every_rank(lambda: _begin(fitted, stored, source or given, parts, ledger, world))
    allowed_widths, width_notes = _allowed_widths(fitted, begun, parts, world)
    step_device = _step_device(fitted, begun, world)
    if step_device is not None:
        local_batch_size, is_fused = fitted.data.batch_size // world.size, fitted.train.compile == "blocks"
        parts.resizer.cost = device_cost(step_device, batch_size=local_batch_size, fused=is_fused)
    method = build_method(fitted.prune, fitted.train.epochs, allowed_widths)
    method.begin(parts.resizer.view(parts.state.model))
    width_notes += _target_notes(fitted.prune, source, parts)
    if stored is not None:
        world.on_every_rank(lambda: restore_method(stored, method, fitted.prune.method))
    world.on_every_rank(lambda: plain_state(method) and None)  # rather than at the first save, an epoch later
    compiler = _build_compiler(fitted, method, parts)
    loader = parts.train_loader
    teacher, teacher_notes = world.on_every_rank(
        lambda: load_teacher(fitted, loader.num_classes, loader.classes, world.device)
    )
    ledger.add_lost(**start.lost)
    ledger.add_startup(start.torchrun_s)
    world.on_rank_zero(lambda: create_run_dir(start.run_dir, config, start.run_id))
    _join_ranks(parts.state, stored, world)
    saver = Saver(
        config,
        start.run_dir,
        start.run_id,
        parts.architecture,
        preprocessing_of(fitted.data),
        fitted.data.batch_size,
        allowed_widths,
        step_device,
        begun.progress,
    )
    sinks, sink_notes = world.on_every_rank(lambda: _open_sinks(config, start, world, ledger, stored))
    world.on_rank_zero(lambda: _replace_damaged(start, config))  # the log is ours alone by now
    loop = TrainLoop(
        config=fitted.train,
        optim=fitted.optim,
        world=world,
        loader=parts.train_loader,
        mix=build_mixing(fitted.train.mixup, fitted.train.cutmix, parts.train_loader.num_classes),
        state=parts.state,
        method=method,
        ledger=ledger,
        guard=StepGuard(world.device) if fitted.train.nonfinite == "skip" else None,
        teacher=teacher,
    )
    trainer = Trainer(
        loop=loop,
        val_loader=parts.val_loader,
        resizer=parts.resizer,
        compiler=compiler,
        progress=begun.progress,
        so_far=begun.so_far,
        is_resumed=stored is not None,
        sinks=sinks,
        watch=Watch(world, stop_wanted, 60 * config.run.save_every_minutes, saver.has_news),
        readback=Readback(world.device),
        batch_size=fitted.data.batch_size,
        image_size=lambda epoch: train_size(fitted.data, epoch - 1),
        save=saver.save,
        finish_save=saver.finish,
    )
    notes = [*start.notes, *fitting_notes, *config.without_effect(), *_data_notes(fitted, parts)]
    notes += [*begun.notes, *image_notes, *width_notes, *teacher_notes, *sink_notes]
    return Run(fitted, trainer, saver, notes)


def _load(config: RunConfig, start: Start, world: World) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(the run's own checkpoint to go on from, the checkpoint that a new run starts from), at most one of them."""
    if start.checkpoint is not None:
        return world.on_every_rank(lambda: load_run(Path(start.checkpoint))), None
    if config.model.checkpoint is not None:
        return None, world.on_every_rank(lambda: load_checkpoint(Path(config.model.checkpoint)))
    return None, None


def _given_weights(config: RunConfig, world: World) -> GivenWeights | None:
    """What `model.weights` asks for, read by every rank; rank 0 comes first, so that one rank fetches it."""
    if config.model.weights is None:
        return None
    world.on_rank_zero(lambda: read_given(config.model.weights, config.model.name) and None)
    return world.on_every_rank(lambda: read_given(config.model.weights, config.model.name))


def _with_model_name(config: RunConfig, begun: dict[str, Any] | None, path: str | None) -> RunConfig:
    """The configuration with the name of the network that the checkpoint at `path` holds, where there is one."""
    if begun is None:
        return config
    name = stored_architecture(begun).name
    if config.model.name is None and is_factory(name):
        raise ConfigError(
            f"model.name: found null, but {path} holds {name}, whose code is not in the file; give --model.name {name} "
            "to have it imported"
        )
    if config.model.name not in (None, name):
        raise ConfigError(
            f"model.name: found {config.model.name}, but {path} holds {name}; allowed: {name}, or null, which takes "
            "what the file holds"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))


def _with_preprocessing(
    config: RunConfig, stored: dict[str, Any] | None, source: dict[str, Any] | None, given: GivenWeights | None
) -> tuple[RunConfig, list[str]]:
    """The configuration with the images that the weights want where it leaves that open; and notes for the user."""
    if given is not None and given.published is not None:
        own, whose = given.published.preprocessing, given.published.label
        return dataclasses.replace(config, data=settled(config.data, own)), [images_note(config.data, own, whose)]
    if (begun := stored or source) is None:
        notes = [] if config.data.val_size is None else [images_note(config.data, None, "nobody")]
        return dataclasses.replace(config, data=settled(config.data, None)), notes
    of_checkpoint = stored_architecture(begun), stored_preprocessing(begun), config.model.checkpoint
    own, whose = own_preprocessing(*of_checkpoint)
    notes = [] if source is None else [images_note(config.data, own, whose)]
    return dataclasses.replace(config, data=settled(config.data, own)), notes


def _build_parts(config: RunConfig, world: World, classes: Sequence[str] | None, listed: Listed | None) -> _Parts:
    train_loader, val_loader = build_split_loaders(config, world, SPLITS, classes, listed)
    torch.manual_seed(config.run.seed)  # the same initial weights on every rank
    side, channels = config.data.image_size, config.data.channels
    architecture = Architecture(
        name=config.model.name, num_classes=train_loader.num_classes, input_shape=(channels, side, side)
    )
    model = build_model(architecture.name, architecture.num_classes, side)
    if is_factory(architecture.name):
        check_own(architecture.name, model, architecture.example_input(), architecture.num_classes)
    prune = config.prune
    changes_widths = prune.shrinks or config.model.narrowed is not None
    resizer = Resizer(model, architecture.example_input(), prune.scope if changes_widths else None, prune.momentum)
    for other in {train_size(config.data, 0), preprocessing_of(config.data).validation.image_size} - {side}:
        # Says so if the network does not take the smallest images, or those of validation.
        complexity(model, dataclasses.replace(architecture, input_shape=(channels, other, other)).example_input())
    freeze(model, config.train.frozen)
    if prune.trains_pruning_net:
        model = build_pruning_net(model, resizer.groups, prune, config.run.seed)
    require_trainable(model, config, world.size)
    model.to(world.device, memory_format=MEMORY_FORMAT)
    torch.manual_seed(config.run.seed + world.rank)  # dropout differs between ranks
    torch.backends.cudnn.benchmark = world.device.type == "cuda"
    ema = MovingAverage(model, config.train.ema_decay) if config.train.ema_decay > 0 else None
    precision = Precision(config.train.precision, world.device)
    head_lr = config.model.head_lr
    head = () if head_lr is None else classifier_names(architecture.name, architecture.num_classes)
    state = TrainState(model, model, build_optimizer(model, config.optim, head, head_lr), precision, ema)
    return _Parts(architecture, train_loader, val_loader, resizer, state, repeated_blocks(model))


def build_pruning_net(model: nn.Module, groups: Sequence[ChannelGroup], prune: PruneConfig, seed: int) -> PruningNet:
    """The PruningNet around a full network, which it takes over. groups: the network's.

    Raises CupError where a layer with channels is of a kind that a PruningNet cannot make.
    """
    searched, meta = prunable_groups(groups, prune.scope), prune.meta_pruning
    widths = widths_at_scales(searched, meta.narrowest, meta.scales, prune.plan_options())
    return PruningNet(model, searched, widths, meta.hidden, seed)


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Let the modules of these names keep their weights, in place. ConfigError for others, and if nothing is left."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            children = ", ".join(child for child, _ in model.named_children())
            raise ConfigError(f"train.freeze: found {name!r}, allowed: modules of the network such as {children}")
        known[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train.freeze: found {', '.join(names)}, which leaves no weight to train")


def require_trainable(model: nn.Module, config: RunConfig, ranks: int) -> None:
    """Raises ConfigError if batch norm would see a single value a channel, of which there is no deviation.

    That is one image a piece where the maps are 1 x 1, with the smallest images of the run.
    """
    local = config.data.batch_size // ranks
    if local // min(config.train.accumulate, local) > 1:
        return
    side = train_size(config.data, 0)
    try:
        with torch.no_grad():
            copy.deepcopy(model).to("meta").train()(torch.zeros(1, config.data.channels, side, side, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"data.batch_size: found {config.data.batch_size}, which on {ranks} ranks with train.accumulate "
            f"{config.train.accumulate} makes pieces of one image, and batch norm at 1 x 1 maps needs two: raise "
            "data.batch_size or lower train.accumulate"
        ) from error


def _begin(
    config: RunConfig,
    stored: dict[str, Any] | None,
    source: dict[str, Any] | GivenWeights | None,
    parts: _Parts,
    ledger: Ledger,
    world: World,
) -> Restored:
    """Bring the parts to where the run goes on or starts; a run from scratch leaves them as they are."""
    if stored is not None:
        return restore(stored, parts.state, parts.resizer, ledger, parts.train_loader, world, config.data.batch_size)
    progress, notes = Progress(), []
    if isinstance(source, GivenWeights):
        notes = start_from_weights(parts.state.model, source, parts.architecture)
    elif source is not None:
        notes = _start_from(source, config, parts)
        progress.gpu_hours_before = source["gpu_hours"]
    elif plan := plan_narrowing(config.model, parts.state.model, parts.resizer.groups, config.prune.scope):
        parts.resizer.replay(parts.state, [plan])
        notes = [f"{config.model.narrowed}: {config.model.name} at FR {parts.resizer.reduction:.2f}"]
    return Restored(progress, so_far=None, allowed_widths=None, step_device=None, notes=notes)


def _start_from(source: dict[str, Any], config: RunConfig, parts: _Parts) -> list[str]:
    """Bring the network to the widths and weights of a checkpoint; everything else begins anew.

    FR stays measured against the full network, for the cuts that led to the widths are replayed. Returns notes.
    """
    refuse_pruning_net(source)
    architecture, classes = stored_architecture(source), parts.architecture.num_classes
    if architecture.num_classes != classes:
        raise ConfigError(
            f"model.checkpoint: {config.model.checkpoint} has {architecture.num_classes} classes, the data set "
            f"has {classes}; allowed: equal numbers, for the classifier is trained further"
        )
    resizer = parts.resizer
    resizer.replay(parts.state, stored_plans(source))
    load_weights(parts.state.model, stored_weights(source))  # a moving average begins as a copy, at the first step
    return [f"starts from {config.model.checkpoint}: {architecture.name} at FR {resizer.reduction:.2f}"]


def _target_notes(prune: PruneConfig, source: dict[str, Any] | None, parts: _Parts) -> list[str]:
    """A note where the network that a run starts from is at the run's target already."""
    if source is None or not prune.shrinks or not has_landed(parts.resizer.view(parts.state.model), prune.target):
        return []
    return [f"prune.{prune.target.setting} {prune.target.value:g} is reached already: nothing more will be cut"]


def _step_device(config: RunConfig, begun: Restored, world: World) -> Device | None:
    """The device whose seconds prune.target_speedup means: by name, as stored, or as rank 0 reads or measures it now.

    None where no speed-up is asked for.
    """
    prune, train = config.prune, config.train
    if not prune.shrinks or prune.trains_pruning_net or prune.target_speedup is None:
        return None
    if prune.device in DEVICES:
        return named_device(prune.device, train.precision)
    if begun.step_device is not None:
        return begun.step_device
    batch_size, side = config.data.batch_size // world.size, config.data.image_size

    def found() -> Device:
        if prune.device != "measured":
            return known_device(prune.device, train.precision)
        return measured_device(Precision(train.precision, world.device), batch_size, side, world.device)

    return Device.from_dict(world.on_rank_zero(lambda: found().to_dict()))


def _allowed_widths(
    config: RunConfig, begun: Restored, parts: _Parts, world: World
) -> tuple[AllowedWidths | None, list[str]]:
    """With prune.round_to: measured, what was measured before, or what rank 0 measures now; and notes."""
    prune, resizer = config.prune, parts.resizer
    if not prune.shrinks or prune.round_to != "measured" or begun.allowed_widths is not None:
        return begun.allowed_widths, []
    return measure_allowed_widths(prune, resizer, parts.state, config.data.batch_size // world.size, world)


def measure_allowed_widths(
    prune: PruneConfig, resizer: Resizer, state: TrainState, local_batch_size: int, world: World
) -> tuple[AllowedWidths, list[str]]:
    """Time the layers that may be cut, on rank 0; the allowed widths of each group, and notes. All ranks call it."""
    started = time.perf_counter()
    groups = prunable_groups(resizer.groups, prune.scope)
    allowed, scattered = world.on_rank_zero(
        lambda: measured_widths(state.model, groups, local_batch_size, state.precision, world.device)
    )
    counts = [len(widths) for widths in allowed.values()]
    notes = [
        f"prune.round_to: measured {len(groups)} layers' widths in {time.perf_counter() - started:.1f} s, "
        f"{min(counts)} to {max(counts)} are allowed each"
    ]
    if uncut := [name for name, widths in allowed.items() if len(widths) == 1]:
        notes.append(
            f"prune.round_to: measured lets {len(uncut)} of {len(groups)} layers stay as wide as they are, for no "
            f"narrower width is faster here: {', '.join(uncut)}; a number cuts them, too"
        )
    if scattered:
        notes.append(
            f"prune.round_to: measured is unsure of {len(scattered)} of {len(groups)} layers, whose times do not "
            f"repeat within {NOISE:.0%} here (other work on this machine?): {', '.join(scattered)}"
        )
    return allowed, notes


def _fitted(config: RunConfig, world: World, has_run: bool) -> tuple[RunConfig, list[str]]:
    """The configuration for this number of ranks, and notes for the user.

    A run that goes on with another number of ranks keeps its batch, so steps and learning rate stay. Where the ranks
    cannot share it, the batch becomes the next smaller one that they can, and the learning rate goes down with it.
    A run that begins is refused in that case (data/sharding.py).
    """
    batch_size = config.data.batch_size
    fitting = batch_size // world.size * world.size
    if not has_run or fitting in (0, batch_size):
        return config, []
    lr = config.optim.lr * fitting / batch_size
    note = (
        f"{world.size} ranks cannot share batches of {batch_size} images: going on with {fitting}, and "
        f"optim.lr {lr:g} in place of {config.optim.lr:g}"
    )
    data, optim = (
        dataclasses.replace(config.data, batch_size=fitting),
        dataclasses.replace(config.optim, lr=lr),
    )
    return dataclasses.replace(config, data=data, optim=optim), [note]


def _data_notes(config: RunConfig, parts: _Parts) -> list[str]:
    """What of the data set is not trained on or not evaluated on, as notes for the user."""
    train, val = parts.train_loader.num_excluded, parts.val_loader.num_excluded
    listed = exclude_file(config.data.path, config.data.exclude)
    notes = [f"{listed} leaves out {train} training and {val} validation images"] if train or val else []
    if is_factory(config.model.name) and parts.resizer.groups:
        notes.append(shrinking_note(config.model.name, parts.resizer.groups))
    splits = {"training": parts.train_loader, "validation": parts.val_loader}
    return [*notes, *unmatched_note(config, parts.train_loader), *passed_over_notes(config, splits)]


def unmatched_note(config: RunConfig, loader: Loader) -> list[str]:
    """What the exclude list names without effect, as notes for the user."""
    names, listed = loader.unmatched, exclude_file(config.data.path, config.data.exclude)
    note = f"{listed} names what is not in the data set, expected SPLIT/CLASS/FILE or SPLIT/CLASS/: {_some(names)}"
    return [note] if names else []


def passed_over_notes(config: RunConfig, splits: dict[str, Loader]) -> list[str]:
    """What no loader takes for an image, as notes for the user."""
    return [
        f"{config.data.path}: not among the {split} images, for its name or place: {_some(loader.passed_over)}"
        for split, loader in splits.items()
        if loader.passed_over
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _build_compiler(config: RunConfig, method: Method, parts: _Parts) -> BlockCompiler:
    return BlockCompiler(
        parts.repeated,
        enabled=config.train.compile == "blocks",
        enough_steps=config.train.compile_steps,
        epochs=config.train.epochs,
        may_cut=lambda epoch: method.may_resize(epoch, parts.resizer.view(parts.state.model)),
        image_side=lambda epoch: train_size(config.data, max(epoch, 1) - 1),
    )


def _join_ranks(state: TrainState, stored: dict[str, Any] | None, world: World) -> None:
    """Wrap the network in DDP, once all ranks are known to start from the same bits: DDP would not notice."""
    digests = world.all_gather(world.on_every_rank(lambda: state_digest(state)))
    if len(set(digests)) > 1:
        raise TrainError(f"the ranks do not start from equal weights ({digests}): do all run the same versions?")
    if stored is not None:
        world.on_every_rank(lambda: restore_running_statistics(stored, state, world))
    state.parallel = world.wrap(state.model)


def _replace_damaged(start: Start, config: RunConfig) -> None:
    put_aside([Path(file) for file in start.damaged])
    create_run_dir(start.run_dir, config, start.run_id)


def _open_sinks(
    config: RunConfig, start: Start, world: World, ledger: Ledger, stored: dict[str, Any] | None
) -> tuple[Sinks, list[str]]:
    """Rank 0's sinks, going on after the log's lines that `stored` says, none on the other ranks; and notes."""
    if not world.is_main:
        return Sinks([]), []
    run_dir, notes = start.run_dir, []

    def has_run(found: bytes) -> bytes:
        lines, note = lines_of_checkpoint(found, stored, str(run_dir.log))
        notes.extend(filter(None, [note]))
        return lines

    try:
        log = JsonLines(run_dir.log) if stored is None else JsonLines(run_dir.log, has_run)
    except OSError as error:
        raise TrainError(f"cannot write in {run_dir.path}: {why_unwritten(error, run_dir.log)}") from error
    began = time.time() - ledger.total_s
    run_id = start.run_id or run_dir.path.name  # an earlier version began it
    tracked = Tracked(run_dir.path.name, run_id, config.run.project, run_dir.path, began, read_log(run_dir.log))
    trackers = []
    for name in config.run.trackers:
        try:
            trackers.append(TRACKERS[name](tracked))
        except Exception as error:  # a view of the log: training goes on without it, whatever it is
            notes.append(f"{name} is left out: {error}")
    return Sinks([log, *trackers, ConsoleSink()], log), notes
