"""Run directories: which one a run gets, and what lies in it.

ROOT/NAME/config.yaml      the resolved configuration
ROOT/NAME/log.jsonl        the events, one object a line
ROOT/NAME/tensorboard/     the same numbers as curves
ROOT/NAME/last.pt          the checkpoint that a resume reads; those before it are last-1.pt, last-2.pt
ROOT/NAME/best.pt          the one with the best top-1
ROOT/NAME/alive.json       seconds so far, while the run is not finished
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.batch import DECODING_ON_GPU
from train.config import RunConfig, differing_keys
from train.errors import ConfigError, TrainError

# Settings that may differ when a run goes on: where it lies (NAME-2 may be asked for by its own name), how it is saved
# and resumed; where the images lie and how they are read; what to do about steps that are not finite.
BESIDE = {
    "run": ("name", "root", "resume", "save_every_minutes", "keep", "timeout_minutes"),
    "data": ("path", "threads", "mmap", *DECODING_ON_GPU),
    "train": ("nonfinite", "nonfinite_limit"),
}


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; nothing is created by asking."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.pt"

    @property
    def alive(self) -> Path:
        return self.path / "alive.json"

    def closing_event(self) -> dict[str, Any] | None:
        """The last event of a run that came to its end, else None. Raises TrainError if the log cannot be read."""
        return next((event for event in self.events() if event.get("event") == "done"), None)

    def job(self) -> str | None:
        """The torchrun job that ran last in it; None where there was none."""
        return next((event.get("job") for event in reversed(self.events()) if event.get("event") == "run"), None)

    def events(self) -> list[dict[str, Any]]:
        """What the log holds; empty where there is none. Raises TrainError if it cannot be read."""
        try:
            return read_log(self.log) if self.log.exists() else []
        except OSError as error:  # exists() passes on what is not an answer: EACCES, EIO, ESTALE
            raise TrainError(f"cannot read {self.log}: {error}") from error


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


def read_log(path: Path) -> list[dict[str, Any]]:
    """All events of a log; a last line that a crash cut short is left out. TrainError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"cannot read {path}: {error}") from error
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            if number == len(lines):
                break
            raise TrainError(f"{path}, line {number}: not a JSON object; the file is damaged")
        events.append(event)
    return events


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
    return differing_keys(_computed(config.to_dict()), _computed(stored))


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, without those with which it may go on otherwise than it began.

    A network's name beside the file that it starts from says nothing more; it may be asked for or left out.
    """
    kept = {
        section: {k: v for k, v in values.items() if k not in BESIDE[section]} if section in BESIDE else values
        for section, values in config.items()
    }
    model = config.get("model", {})
    return kept | {"model": {**model, "name": None} if model.get("from") else model}
