"""Run directories: which one a run gets, and what lies in it.

ROOT/NAME/config.yaml      the resolved configuration
ROOT/NAME/log.jsonl        the events, one object a line
ROOT/NAME/tensorboard/     the same numbers as curves
ROOT/NAME/last.pt          the checkpoint that a resume reads
ROOT/NAME/best.pt          the one with the best top-1
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.config import RunConfig, differing_keys
from train.errors import ConfigError, TrainError


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

    def is_finished(self) -> bool:
        """Whether the run in it came to its end."""
        return any(event.get("event") == "done" for event in read_log(self.log)) if self.log.exists() else False


def find_run_dir(config: RunConfig) -> RunDir:
    """The directory that this run gets, there already or not; creates nothing. Rank 0 only.

    An unfinished run of the same configuration goes on; a finished one is kept and the next free number taken. Raises
    ConfigError for an unfinished run of another configuration, TrainError where the directory holds something else.
    """
    number = 1
    while True:
        name = config.run.name if number == 1 else f"{config.run.name}-{number}"
        run_dir = RunDir(Path(config.run.root) / name)
        if not run_dir.path.exists() or (run_dir.path.is_dir() and not any(run_dir.path.iterdir())):
            return run_dir
        if not run_dir.config.exists():
            raise TrainError(f"{run_dir.path} is there and is no run directory; choose another --run.name")
        if config.run.resume == "auto" and not run_dir.is_finished():
            _check_same(run_dir, config)
            return run_dir
        number += 1


def create_run_dir(run_dir: RunDir, config: RunConfig) -> None:
    """Make the directory, with config.yaml in it, unless a run is in it already. Rank 0 only.

    Raises TrainError where it cannot be written.
    """
    if run_dir.config.exists():
        return
    temporary = run_dir.config.with_name("config.yaml.part")
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        temporary.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
        temporary.replace(run_dir.config)
    except OSError as error:
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
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise TrainError(f"{path}, line {number}: not a JSON object; the file is damaged") from error
    return events


def _check_same(run_dir: RunDir, config: RunConfig) -> None:
    try:
        stored = yaml.safe_load(run_dir.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainError(f"cannot read {run_dir.config}: {error}") from error
    different = differing_keys(_computed(config.to_dict()), _computed(stored if isinstance(stored, dict) else {}))
    if different:
        raise ConfigError(
            f"{run_dir.path} holds an unfinished run of another configuration: {', '.join(different)}; take the same "
            "configuration to finish it, another --run.name, or --run.resume never"
        )


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes: where it lies and how it is resumed do not.

    Nor does a network's name beside the file that it starts from, which names it; it may be asked for or left out.
    """
    run = {key: value for key, value in config.get("run", {}).items() if key not in ("root", "resume")}
    model = config.get("model", {})
    return config | {"run": run, "model": {**model, "name": None} if model.get("from") else model}
