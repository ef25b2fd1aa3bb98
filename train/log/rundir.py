"""What lies in a run directory. Reading it needs no torch.

ROOT/NAME/config.yaml      the resolved configuration
ROOT/NAME/log.jsonl        the events, one object a line
ROOT/NAME/tensorboard/     the same numbers as curves
ROOT/NAME/last.pt          the checkpoint that a resume reads; those before it are last-1.pt, last-2.pt
ROOT/NAME/best.pt          the one with the best top-1
ROOT/NAME/alive.json       seconds so far, while the run is not finished
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import TrainError


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
