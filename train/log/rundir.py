"""What lies in a run directory. Reading it needs no torch.

ROOT/NAME/config.yaml      the resolved configuration, and the run's id
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
from train.files import open_regular
from train.schema import first_misfit

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What a run may be called."""
MAX_LINE_BYTES = 1 << 26
"""A line of 100,000 ranks has fewer."""

SECONDS = dict[str, float]
EPOCH = range(1, 10**9)
COST = {"flops": float, "macs": float, "params": float, "flops_reduction": float, "macs_reduction": float}
# What a run writes and somebody reads again: event -> key -> kind. A line may lack keys that its version did not have.
EVENTS = {
    "run": {
        "run_id": str | None,
        "directory": str,
        "config": dict,
        "model": str,
        "from": str | None,
        "narrowed": str | None,
        "gpu_hours_before": float | None,
        "method": str,
        "shrinks": bool,
        "epochs": EPOCH,
        "first_epoch": int,
        "first_step": int,
        "job": str | None,
        "batch_size": int,
        "precision": str,
        "loader": str,
        "world_size": int,
        "devices": list[str],
        "device": str,
        "versions": dict[str, str],
        "train_images": int,
        "val_images": int,
        "val_size": int,
        **{f"dense_{key}": float for key in ("flops", "macs", "params")},
    },
    "epoch": {
        **COST,
        "epoch": EPOCH,
        "threshold": float | None,
        "step_speedup": float | None,
        "widths": dict[str, int],
        "train_loss": float,
        "top1": float,
        "top5": float,
        "raw_top1": float | None,
        "raw_top5": float | None,
        "lr": float,
        "images_per_s": float,
        "image_size": int,
        "skipped_steps": int,
        "compiled": bool,
        "seconds": SECONDS,
        "seconds_by_rank": list[SECONDS],
        "all_reduce_s": float | None,
        "peak_memory": int,
        "device_memory": int | None,
        "gpu_hours": float,
        "cpu_seconds": float | None,
        "device": str,
    },
    "resize": {
        "when": str,
        "epoch": EPOCH,
        "step": int,
        "threshold": float | None,
        "flops_reduction_before": float,
        "flops_reduction_after": float,
        "removed": dict[str, int],
        "loss_before": float | None,
        "loss_after": float | None,
        "seconds": float,
        "digest": str,
        "digests": list[str],
    },
    "done": {
        **COST,
        "directory": str,
        **{f"dense_{key}": float for key in ("flops", "macs", "params")},
        "epoch": EPOCH,
        "top1": float,
        "top5": float,
        "best_top1": float,
        "best_top5": float,
        "resizes": int,
        "steps": int,
        "seconds": SECONDS,
        "gpu_hours": float,
        "cpu_seconds": float | None,
        "device": str,
    },
    "note": {"message": str},
}
EVENTS["zero"] = EVENTS["resize"]


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

    def run_id(self) -> str | None:
        """The id in the log; None where there is no log, or one of an earlier version."""
        return next((event["run_id"] for event in self.events() if event.get("run_id") is not None), None)

    def events(self) -> list[dict[str, Any]]:
        """What the log holds; empty where there is none. Raises TrainError if it cannot be read."""
        try:
            return read_log(self.log) if self.log.exists() else []
        except OSError as error:  # exists() passes on what is not an answer: EACCES, EIO, ESTALE
            raise TrainError(f"cannot read {self.log}: {error.strerror}") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """All events of a log; a last line that a crash cut short, or that is being written, is left out.

    Raises TrainError if it cannot be read, or a line is none that a run writes.
    """
    events = []
    try:
        with open_regular(path) as file:
            number, line = 1, file.readline(MAX_LINE_BYTES)
            while line:
                # What comes after half a line is its other half, written meanwhile by a run that goes on.
                is_half = not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES
                after = b"" if is_half else file.readline(MAX_LINE_BYTES)
                event, problem = _parse(line)
                if problem is not None and (after or event is not None):
                    raise TrainError(
                        f"{path}, line {number}: {problem}; take the line out, or move the file away: a run that goes "
                        "on writes its log again from its checkpoint"
                    )
                if problem is None:
                    events.append(event)
                number, line = number + 1, after
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror}") from error
    return events


def first_bad_line(text: str) -> str | None:
    """What is wrong with the first line that is none of a log; None where all are."""
    problems = (_parse(line.encode())[1] for line in text.split("\n")[:-1])
    return next(filter(None, problems), None if text.endswith("\n") or not text else "its last line is cut short")


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The event in a line, None where there is none, and what is wrong with it."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None, "no JSON object, so no line of a log"
    if not isinstance(event, dict):
        return None, "no JSON object, so no line of a log"
    kinds = {"event": str, "time_s": float}
    wrong = first_misfit(event, kinds) or first_misfit(event, EVENTS.get(str(event.get("event")), {}))
    return event, wrong and f"found {wrong}: {str(event[wrong])[:40]}, which no run writes"
