"""One run from its configuration to its closing line."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from data.batch import preprocessing_of
from train.build import Run, build_run
from train.checkpoint.saver import Saver
from train.config import RunConfig
from train.errors import TrainError
from train.log.heartbeat import Beat, write_alive
from train.log.ledger import Ledger
from train.log.rundir import RunDir
from train.log.sinks import ConsoleSink
from train.loop.engine import Stopped, fit
from train.loop.patience import Patience
from train.loop.trainer import Trainer
from train.peers import Peers
from train.signals import StopSignals
from train.start import Start, find_start
from train.world import World, torchrun_job

AGENT_SIGNAL_TIMEOUT_S = 5.0
PACKAGES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
"""Of which the log holds the versions, where they are installed."""


def run(config: RunConfig, world: World, ledger: Ledger, has_word: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train as `config` says; returns the closing event, or an event `stopped` if a signal asked for it.

    has_word: called once the run directory has word of the seconds so far. All ranks call it. Raises train/world.py's
    USER_ERRORS.
    """
    with Peers(world, config.run.silence_s) as peers:
        return _run(config, world, ledger, has_word, peers)


def _run(config: RunConfig, world: World, ledger: Ledger, has_word: Callable[[], None], peers: Peers) -> dict[str, Any]:
    start = Start(**world.on_rank_zero(lambda: vars(find_start(config, torchrun_job()))))
    if start.done is not None:
        if world.is_main:
            message = f"{start.directory} was finished by this job already: nothing to do"
            ConsoleSink().write({"event": "note", "message": message})
        return start.done
    signals = StopSignals(answers=world.is_main)
    built = build_run(config, start, world, ledger, lambda: signals.stop_wanted)
    trainer = built.trainer
    loaders = [trainer.loop.loader, trainer.val_loader]
    with signals, Patience(loaders, config.data.path, world.rank, lambda: signals.stop_wanted):
        beat = _begin_beat(start, ledger) if world.is_main else None  # a kill from here on is in the account
        has_word()
        try:
            trainer.sinks.write(_run_event(built, start))
            for note in built.notes:
                trainer.sinks.note(note, ledger.total_s)
            ledger.end_startup()
            done = {**fit(trainer), "directory": start.directory}
            if beat is not None:
                beat.stop()
            world.on_rank_zero(lambda: _close(trainer, built.saver, start.run_dir, done))
            peers.leave()
            return done
        except Stopped:
            peers.leave()
            _require_saved(built.saver, start.run_dir)
            _await_own_signal(signals)
            return _stopped_event(trainer, start.run_dir)
        except BaseException as error:  # the minutes that a rank waited for a dead one count, too
            peers.leave(error)  # before this rank waits for its disk
            if beat is not None:
                beat.now()
            raise
        finally:
            built.saver.close(trainer)
            if beat is not None:
                beat.stop()
            trainer.sinks.close()
            for loader in loaders:
                loader.close()


def _begin_beat(start: Start, ledger: Ledger) -> Beat:
    beat = Beat(lambda: write_alive(start.run_dir.alive, ledger))
    for file in start.counted if start.run_dir.alive.exists() else ():
        with suppress(OSError):  # counted twice at worst
            Path(file).unlink(missing_ok=True)
    return beat


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
        trainer.sinks.sync_log()
        run_dir.alive.unlink(missing_ok=True)


def _require_saved(saver: Saver, run_dir: RunDir) -> None:
    if saver.failure:
        raise TrainError(
            f"the run is not saved as it stands: {saver.failure}; the same command goes on from the checkpoint in "
            f"{run_dir.path}, if there is one"
        )


def _await_own_signal(signals: StopSignals) -> None:
    """Let torchrun signal this rank, too, before it ends.

    One signalled rank stops all ranks. A rank that exits before its own torchrun has signalled it looks to that one
    like a normal end of the job.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID") is not None:
        signals.wait(AGENT_SIGNAL_TIMEOUT_S)


def _stopped_event(trainer: Trainer, run_dir: RunDir) -> dict[str, Any]:
    step = 0 if trainer.so_far is None else trainer.so_far.step
    return {"event": "stopped", "epoch": trainer.progress.epoch + 1, "step": step, "directory": str(run_dir.path)}


def _run_event(built: Run, start: Start) -> dict[str, Any]:
    """The run event."""
    config, trainer = built.config, built.trainer
    world, dense = trainer.world, trainer.resizer.dense
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine() + " CPU"
    return {
        "event": "run",
        "time_s": trainer.ledger.total_s,
        "run_id": start.run_id,
        "directory": start.directory,
        "config_digest": hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest(),
        "config": config.to_dict(),
        "model": config.model.name,
        "from": config.model.checkpoint,
        "narrowed": config.model.narrowed,
        "gpu_hours_before": trainer.progress.gpu_hours_before,
        "method": trainer.method.label,
        "shrinks": config.prune.shrinks,
        "epochs": config.train.epochs,
        "first_epoch": trainer.progress.epoch + 1,
        "first_step": 0 if trainer.so_far is None else trainer.so_far.step,
        "job": torchrun_job(),
        "batch_size": config.data.batch_size,
        "precision": config.train.precision,
        "loader": trainer.loop.loader.kind,
        "world_size": world.size,
        "devices": world.all_gather(device),
        "device": world.device.type,
        "versions": {
            "python": platform.python_version(),
            **_versions(*PACKAGES),
        },
        "train_images": trainer.loop.loader.num_images,
        "val_images": trainer.val_loader.num_images,
        "val_size": preprocessing_of(config.data).validation.image_size,
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
