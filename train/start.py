"""Where a run begins or goes on: found by rank 0 at once, as plain data that is broadcast once."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.batch import DECODING_ON_GPU
from train.checkpoint.file import CheckpointError, load_checkpoint, newest_checkpoint
from train.config import RunConfig, config_from_dict, differing_keys
from train.errors import ConfigError, TrainError
from train.log.heartbeat import lost_seconds
from train.log.rundir import RunDir

# Settings that may differ when a run goes on: where it lies (NAME-2 may be asked for by its own name), how it is saved
# and resumed; where the images lie and how they are read; what to do about steps that are not finite.
MAY_DIFFER = {
    "run": ("name", "root", "resume", "save_every_minutes", "keep", "timeout_minutes"),
    "data": ("path", "threads", "mmap", *DECODING_ON_GPU),
    "train": ("nonfinite", "nonfinite_limit"),
}


@dataclass(frozen=True)
class Start:
    """The start of a run; plain data.

    directory: of the run, there already or not. done: its closing event, where this very job has finished it.
    checkpoint: to go on from; None for a run that begins. damaged: newer checkpoints that cannot be read, and why.
    goes_on: whether a run is in the directory already. lost: what killed processes spent after the checkpoint, seconds.
    """

    directory: str
    done: dict[str, Any] | None = None
    checkpoint: str | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    goes_on: bool = False
    lost: dict[str, float] = field(default_factory=lambda: {"wall_s": 0.0, "rank_s": 0.0})

    @property
    def run_dir(self) -> RunDir:
        return RunDir(Path(self.directory))

    @property
    def notes(self) -> list[str]:
        """Messages for the user."""
        return [
            f"{why}; going on from {self.checkpoint}, which was written before, and {Path(file).name} becomes "
            f"{Path(file).name}.damaged"
            for file, why in self.damaged.items()
        ]


def find_start(config: RunConfig, job: str | None = None) -> Start:
    """Look at what is on the disk; creates nothing. Rank 0 only.

    job: torchrun's name of this job (train/world.py). Raises ConfigError for an unfinished run of another
    configuration, TrainError for a directory that is no run's or cannot be read, CheckpointError where checkpoints are
    there and none can be read, or all are gone.
    """
    run_dir = find_run_dir(config, job)
    if done := run_dir.closing_event():  # torchrun restarts a job that failed after its end
        return Start(str(run_dir.path), done=done)
    try:
        checkpoint, stored, damaged = newest_checkpoint(run_dir.last)
    except OSError as error:
        raise CheckpointError(f"cannot look for checkpoints in {run_dir.path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete them to start this run over, or take --run.resume never") from error
    if checkpoint is None:
        _require_young(run_dir)
    ranks = (stored or {}).get("ranks")
    account = ranks[0].get("ledger") if isinstance(ranks, list) and ranks and isinstance(ranks[0], dict) else None
    return Start(
        directory=str(run_dir.path),
        checkpoint=checkpoint and str(checkpoint),
        damaged={str(file): why for file, why in damaged.items()},
        goes_on=run_dir.config.exists(),
        lost=lost_seconds(run_dir.alive, account),
    )


def find_run_dir(config: RunConfig, job: str | None = None) -> RunDir:
    """The directory that this run gets, there already or not; creates nothing. Rank 0 only.

    An unfinished run of the same configuration goes on; a finished one is kept and the next free number taken. What
    the torchrun job called `job` began or finished is its own after a restart, whatever run.resume says. Raises
    ConfigError for an unfinished run of another configuration, TrainError where the directory holds something else or
    cannot be looked into.
    """
    try:
        return _find_run_dir(config, job)
    except OSError as error:
        raise TrainError(f"cannot look into {config.run.root}: {error}; choose another --run.root") from error


def _find_run_dir(config: RunConfig, job: str | None) -> RunDir:
    number = 1
    while True:
        name = config.run.name if number == 1 else f"{config.run.name}-{number}"
        run_dir = RunDir(Path(config.run.root) / name)
        if not run_dir.path.exists() or (run_dir.path.is_dir() and _holds_nothing(run_dir.path)):
            return run_dir
        if not run_dir.config.exists():
            raise TrainError(f"{run_dir.path} is there and is no run directory; choose another --run.name")
        if job is not None and run_dir.job() == job and not _differences(run_dir, config):
            return run_dir
        if config.run.resume == "auto" and run_dir.closing_event() is None:
            if different := _differences(run_dir, config):
                raise ConfigError(
                    f"{run_dir.path} holds an unfinished run of another configuration: {', '.join(different)}; take "
                    "the same configuration to finish it, another --run.name, or --run.resume never"
                )
            return run_dir
        number += 1


def _holds_nothing(path: Path) -> bool:
    """Whether a run may begin there: nothing lies in it, but perhaps what a kill left of a first file."""
    return all(file.name.endswith(".part") for file in path.iterdir())


def create_run_dir(run_dir: RunDir, config: RunConfig) -> None:
    """Make the directory, with config.yaml in it, unless a run is in it already. Rank 0 only.

    Raises TrainError where it cannot be written.
    """
    temporary = run_dir.config.with_name("config.yaml.part")
    try:
        if run_dir.config.exists():
            return
        run_dir.path.mkdir(parents=True, exist_ok=True)
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
        temporary.replace(run_dir.config)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise TrainError(
            f"cannot write the run directory {run_dir.path}: {error.strerror}; choose another --run.root or --run.name"
        ) from error


def _require_young(run_dir: RunDir) -> None:
    """Raises CheckpointError for a run that is past its first epoch: starting over would write over what is left of it.

    A kill in the first save leaves that epoch's line, and perhaps `best`; then nothing but this epoch is lost.
    """
    epochs = [event.get("epoch", 0) for event in run_dir.events() if event.get("event") == "epoch"]
    if run_dir.best.exists():
        epochs.append(load_checkpoint(run_dir.best).get("progress", {}).get("epoch", 0))
    if max(epochs, default=0) > 1:
        raise CheckpointError(
            f"{run_dir.path} holds {max(epochs)} epochs of an unfinished run, but {run_dir.last.name} and those before "
            "it are not there: put one back, delete the directory to start over, or take --run.resume never"
        )


def _differences(run_dir: RunDir, config: RunConfig) -> list[str]:
    """The settings in which the run in the directory computes something else than `config` says, with both values."""
    try:
        stored = yaml.safe_load(run_dir.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainError(f"cannot read {run_dir.config}: {error}") from error
    if not isinstance(stored, dict) or not all(isinstance(section, dict) for section in stored.values()):
        raise TrainError(
            f"{run_dir.config} is no configuration of a run; the file is damaged: choose another --run.name"
        )
    try:
        stored = config_from_dict(stored).to_dict()  # settings that were not there yet have their defaults
    except ConfigError as error:
        raise TrainError(f"{run_dir.config} is no configuration of this version: {error}") from error
    return differing_keys(_computed(config.to_dict()), _computed(stored))


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, without those with which it may go on otherwise than it began.

    The name of a network that comes from a checkpoint says nothing more; it may be given or left out.
    """
    kept = {
        section: {k: v for k, v in values.items() if k not in MAY_DIFFER[section]} if section in MAY_DIFFER else values
        for section, values in config.items()
    }
    model = config.get("model", {})
    return kept | {"model": {**model, "name": None} if model.get("checkpoint") else model}
