"""Where a run begins or goes on: found by rank 0 at once, as plain data that is broadcast once."""

import math
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data import DataConfig, Preprocessing
from data.batch import DECODING_ON_GPU, preprocessing_of
from train.checkpoint.archive import CheckpointError, UnreadableError
from train.checkpoint.file import newest_checkpoint
from train.config import RunConfig, differing_keys
from train.config_file import ConfigDamagedError, StoredConfig, read_config, with_todays_settings
from train.errors import ConfigError, TrainError
from train.log.attempt import Unheard, unheard_seconds
from train.log.heartbeat import read_alive
from train.log.rundir import RunDir
from train.network.sources import names_network
from train.schema import fits

# Settings that may differ when a run goes on: where it lies (NAME-2 may be asked for by its own name), how it is saved
# and resumed; where the images lie and how they are read; what to do about steps that are not finite.
MAY_DIFFER = {
    "run": ("name", "root", "resume", "save_every_minutes", "keep", "timeout_minutes", "trackers", "project"),
    "data": ("path", "threads", "mmap", *DECODING_ON_GPU),
    "train": ("nonfinite", "nonfinite_limit"),
}
PREPROCESSING = tuple(entry.name for entry in fields(Preprocessing))
AWAY = "move it away, or start from it with --model.checkpoint and another --run.name"


@dataclass(frozen=True)
class Start:
    """The start of a run; plain data.

    directory: of the run, there already or not. done: its closing event, where this very job has finished it.
    run_id: tells this run's files from those of others; None where an earlier version began it.
    checkpoint: to go on from; None for a run that begins. damaged: newer files that cannot be read, and why.
    has_run: whether a run is in the directory already. lost: what killed processes spent after the checkpoint, seconds.
    torchrun_s: what torchrun took to start this process, seconds.
    counted: files that tell of killed attempts, to be removed once these are in the account.
    notes: messages for the user.
    """

    directory: str
    done: dict[str, Any] | None = None
    run_id: str | None = None
    checkpoint: str | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    has_run: bool = False
    lost: dict[str, float] = field(default_factory=lambda: {"wall_s": 0.0, "rank_s": 0.0})
    torchrun_s: float = 0.0
    counted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> RunDir:
        return RunDir(Path(self.directory))


@dataclass(frozen=True)
class _Found:
    """What lies in a run directory. damaged: files that cannot be read, and why, in words for the user."""

    run: StoredConfig
    checkpoint: Path | None
    content: dict[str, Any] | None
    damaged: dict[Path, str]


def find_start(config: RunConfig, job: str | None = None) -> Start:
    """Look at what is on the disk; creates nothing. Rank 0 only.

    job: torchrun's name of this job (train/world.py). Raises ConfigError for an unfinished run of another
    configuration, TrainError for a directory that is no run's or cannot be read, CheckpointError where checkpoints are
    there and none can be read, or all are gone, or the newest is another run's.
    """
    run_dir = find_run_dir(config, job)
    if done := run_dir.closing_event():  # torchrun restarts a job that failed after its end
        return Start(str(run_dir.path), done=done)
    if _is_free(run_dir.path):
        unheard = unheard_seconds(Path(config.run.root), config.run.name, heard_at=-math.inf)
        new_id = secrets.token_hex(8)
        return Start(
            str(run_dir.path),
            run_id=new_id,
            lost=_lost(unheard),
            torchrun_s=unheard.torchrun_s,
            counted=unheard.files,
            notes=_name_taken(config, run_dir),
        )
    try:
        found = _look_into(run_dir)
    except UnreadableError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete them to start this run over, or take --run.resume never") from error
    if found.checkpoint is None:
        _refuse_overwrite(run_dir)
    else:
        _require_own(found, run_dir)
    ranks = (found.content or {}).get("ranks")
    account = ranks[0].get("ledger") if isinstance(ranks, list) and ranks and isinstance(ranks[0], dict) else None
    alive, alive_note = read_alive(run_dir.alive)
    unheard = unheard_seconds(Path(config.run.root), config.run.name, alive["at"] if alive else -math.inf)
    return Start(
        directory=str(run_dir.path),
        run_id=found.run.run_id or (found.content or {}).get("run_id"),
        checkpoint=found.checkpoint and str(found.checkpoint),
        damaged={str(file): why for file, why in found.damaged.items()},
        has_run=True,
        lost=_lost(unheard, alive, account),
        torchrun_s=unheard.torchrun_s,
        counted=unheard.files,
        notes=[*_notes(found), *filter(None, [alive_note])],
    )


def _lost(
    unheard: Unheard, alive: dict[str, float] | None = None, account: dict[str, Any] | None = None
) -> dict[str, float]:
    """What killed processes spent after a checkpoint: wall seconds, and rank seconds (times the ranks that ran).

    alive: the run's last word. account: the stored ledger of the checkpoint, None where there is none.
    """
    lost = {"wall_s": 0.0, "rank_s": 0.0} if alive is None else {key: alive[key] for key in ("wall_s", "rank_s")}
    kinds = {"seconds": dict[str, float], "rank_s": float}
    if fits(account, kinds) and kinds.keys() <= account.keys():
        lost["wall_s"] -= sum(account["seconds"].values())
        lost["rank_s"] -= account["rank_s"]
    unheard_s = {"wall_s": unheard.wall_s, "rank_s": unheard.rank_s}
    return {key: max(0.0, seconds) + unheard_s[key] for key, seconds in lost.items()}


def _notes(found: _Found) -> list[str]:
    return [
        f"{why}; going on from {found.checkpoint}, and {file.name} becomes {file.name}.damaged"
        for file, why in found.damaged.items()
    ]


def _name_taken(config: RunConfig, run_dir: RunDir) -> list[str]:
    """A note where a new run gets another name than it was given."""
    if run_dir.path.name == config.run.name:
        return []
    why = "is finished" if config.run.resume == "auto" else "is there (run.resume: never)"
    return [f"{Path(config.run.root) / config.run.name} {why}: this is a new run, {run_dir.path.name}"]


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
        if _is_free(run_dir.path):
            return run_dir
        if not any(file.exists() for file in (run_dir.config, run_dir.log, *run_dir.path.glob("*.pt"))):
            raise TrainError(f"{run_dir.path} is there and is no run directory; choose another --run.name")
        if job is not None and run_dir.job() == job and not changed_settings(run_dir, config):
            return run_dir
        if config.run.resume == "auto" and run_dir.closing_event() is None:
            if different := changed_settings(run_dir, config):
                raise ConfigError(
                    f"{run_dir.path} holds an unfinished run of another configuration: {', '.join(different)}; take "
                    "the same configuration to finish it, another --run.name, or --run.resume never"
                )
            return run_dir
        number += 1


def changed_settings(run_dir: RunDir, config: RunConfig) -> list[str]:
    """The settings in which the run in the directory computes something else than `config` says, with both values.

    Raises TrainError or CheckpointError where nothing there says what it computes.
    """
    try:
        stored = read_config(run_dir)
    except ConfigDamagedError:
        stored = _look_into(run_dir).run
    return _differing(stored.settings, config.to_dict())


def _is_free(path: Path) -> bool:
    """Whether a run may begin there: nothing lies in it, but perhaps what a kill left of a first file."""
    return not path.exists() or (path.is_dir() and all(file.name.endswith(".part") for file in path.iterdir()))


def _look_into(run_dir: RunDir) -> _Found:
    """What a start needs to know of the run in the directory, whichever of its files are left.

    Raises UnreadableError or TrainError where the system does not let a file be read, CheckpointError where there are
    checkpoints and none is good, TrainError where nothing says what the run computes.
    """
    checkpoint, content, damaged = newest_checkpoint(run_dir.last, run_dir.best)
    try:
        run = read_config(run_dir)
    except ConfigDamagedError as error:
        run = _run_in_checkpoint(content, error)
        if run_dir.config.exists():
            damaged = {run_dir.config: str(error), **damaged}
    return _Found(_with_id_of_log(run, run_dir), checkpoint, content, damaged)


def _run_in_checkpoint(content: dict[str, Any] | None, error: ConfigDamagedError) -> StoredConfig:
    """The run that a checkpoint tells of; raises TrainError where there is none, or it does not."""
    try:
        return StoredConfig(with_todays_settings((content or {}).get("config")), (content or {}).get("run_id"))
    except ConfigError:
        raise TrainError(f"{error}, and no checkpoint there says what it was: choose another --run.name") from error


def _with_id_of_log(run: StoredConfig, run_dir: RunDir) -> StoredConfig:
    """The run with the id that its log has, too. Raises TrainError if that is another one."""
    logged = run_dir.run_id()
    if None not in (logged, run.run_id) and logged != run.run_id:
        raise TrainError(
            f"{run_dir.log} is the log of another run (id {logged}; {run_dir.config.name} says {run.run_id}): move it "
            "away, and it is written again from the checkpoint"
        )
    return StoredConfig(run.settings, run.run_id or logged)


def _require_own(found: _Found, run_dir: RunDir) -> None:
    """Raises CheckpointError for a checkpoint of another run than the one in the directory.

    Earlier versions gave runs no id: there, the settings must be the same.
    """
    if "ranks" not in found.content:  # a network alone, which is refused when it is loaded
        return
    ours, theirs = found.run.run_id, found.content.get("run_id")
    if None not in (ours, theirs):
        difference = "" if ours == theirs else f"id {theirs}, here is {ours}"
    else:
        difference = ", ".join(_differing(found.run.settings, _settings_of(found)))
    if difference:
        config = found.content.get("config") or {}
        names = config.get("run") if isinstance(config.get("run"), dict) else {}
        raise CheckpointError(
            f"{found.checkpoint} is a checkpoint of another run, {names.get('root')}/{names.get('name')}, not of the "
            f"one in {run_dir.path} ({difference}): {AWAY}"
        )


def _settings_of(found: _Found) -> dict[str, Any]:
    try:
        return with_todays_settings(found.content.get("config"))
    except ConfigError as error:
        raise CheckpointError(f"{found.checkpoint} does not say of which run it is ({error}): {AWAY}") from error


def _refuse_overwrite(run_dir: RunDir) -> None:
    """Raises CheckpointError for a run that is past its first epoch: starting over would write over what is left of it.

    A kill in the first save leaves that epoch's line; then nothing but this epoch is lost.
    """
    epochs = [event.get("epoch", 0) for event in run_dir.events() if event.get("event") == "epoch"]
    if max(epochs, default=0) > 1:
        raise CheckpointError(
            f"{run_dir.path} holds {max(epochs)} epochs of an unfinished run, but {run_dir.last.name}, those before it "
            f"and {run_dir.best.name} are not there: put one back, delete the directory to start over, or take "
            "--run.resume never"
        )


def _differing(stored: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    theirs, ours = _computed(stored), _computed(settings)
    # What is left open is as the run's own checkpoint says, so as it began.
    open_ones = {key: theirs["data"][key] for key in PREPROCESSING if ours["data"][key] is None}
    return differing_keys(ours | {"data": ours["data"] | open_ones}, theirs)


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, without those with which it may go on otherwise than it began.

    The name of a network that comes from a checkpoint, or with its weights, says nothing more; it may be given or left
    out. Without those, open settings of the images have their usual values, as earlier versions stored them.
    """
    kept = {
        section: {k: v for k, v in values.items() if k not in MAY_DIFFER[section]} if section in MAY_DIFFER else values
        for section, values in config.items()
    }
    model = config["model"]
    if model["checkpoint"] or model["weights"]:
        says_itself = model["checkpoint"] or names_network(model["weights"])
        return kept | {"model": {**model, "name": None if says_itself else model["name"]}}
    given = {key: _tuple(config["data"][key]) for key in (*PREPROCESSING, "channels")}
    images = preprocessing_of(DataConfig(**given))
    usual = asdict(images) | {"val_size": images.validation.image_size}
    return kept | {"data": kept["data"] | {key: _list(value) for key, value in usual.items()}}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
