"""Experiment trackers: TensorBoard, Weights & Biases, MLflow and trackio as sinks. Each is a view of the log.

The x axis is the epoch everywhere. A resume goes on in the tracker's run of the first attempt, found by the run's id.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from train.errors import ConfigError
from train.log.sinks import Event, Sink

SCALARS = (
    ("cup/flops_reduction(x)", "flops_reduction", 1),
    ("cup/macs_reduction(x)", "macs_reduction", 1),
    ("cup/threshold", "threshold", 1),
    ("cup/flops(GFLOPs)", "flops", 1e-9),
    ("cup/params(M)", "params", 1e-6),
    ("train/loss", "train_loss", 1),
    ("train/lr", "lr", 1),
    ("train/throughput(images_per_s)", "images_per_s", 1),
    ("val/top1(%)", "top1", 1),
    ("val/top5(%)", "top5", 1),
    ("val/top1_without_ema(%)", "raw_top1", 1),
    ("val/top5_without_ema(%)", "raw_top5", 1),
    ("train/image_size(px)", "image_size", 1),
    ("time/gpu_hours(h)", "gpu_hours", 1),
)
"""(tag with its unit, key of the epoch event, factor)"""

FLUSH_INTERVAL = "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL"
"""Seconds after which W&B writes its offline file. By default 15, and a kill takes the epochs since then."""


def points(event: Event) -> dict[str, float]:
    """What an event adds to the curves at its epoch, tag -> value; empty for an event that adds nothing."""
    if event["event"] == "resize":
        return {"cup/removed(channels)": sum(event["removed"].values()), "cup/resize(s)": event["seconds"]}
    if event["event"] == "zero":
        return {"cup/zeroed(channels)": sum(event["removed"].values())}
    if event["event"] != "epoch":
        return {}
    return {
        # A log of an earlier version lacks some of them.
        **{tag: event[key] * factor for tag, key, factor in SCALARS if event.get(key) is not None},
        **{f"time/{kind}(s)": seconds for kind, seconds in event["seconds"].items()},
        **{f"widths/{group}(channels)": width for group, width in event["widths"].items()},
    }


@dataclass(frozen=True)
class Tracked:
    """The run that a tracker shows.

    began: Unix time at which the events' `time_s` is 0; pauses between processes do not show. events: what the log
    holds already.
    """

    name: str
    run_id: str
    project: str
    directory: Path
    began: float
    events: Sequence[Event]

    @property
    def unique_name(self) -> str:
        """For trackers that know a run by its name."""
        return f"{self.name}-{self.run_id[:8]}"


class Tracker(ABC):
    """What all trackers have in common. They ask for no live progress."""

    name: str

    def write(self, event: Event) -> None:
        if event["event"] == "run" and "config" in event:  # a log of the oldest version lacks it
            self._configure(event["config"])
        elif values := points(event):
            self._add(values, event)

    def progress(self, what: str, step: int, steps: int) -> None:
        return  # nothing is shown between epochs

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _configure(self, config: dict[str, Any]) -> None:
        """Show the run's resolved settings."""

    @abstractmethod
    def _add(self, values: dict[str, float], event: Event) -> None:
        """Add points, tag -> value, at the event's epoch and time."""


class TensorBoard(Tracker):
    """Written anew at each start: what killed runs wrote may hold points that a resume has taken back."""

    name = "tensorboard"

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter  # its import takes seconds, and rank 0 alone needs it

        directory = run.directory / "tensorboard"
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._began = run.began
        self._writer = SummaryWriter(str(directory), purge_step=0)  # for viewers that have read the old files
        for event in run.events:
            self.write(event)
        self._print_failure, threading.excepthook = threading.excepthook, self._thread_failed

    def _configure(self, config: dict[str, Any]) -> None:
        self._writer.add_text("config", f"```\n{yaml.safe_dump(config, sort_keys=False)}```")

    def _add(self, values: dict[str, float], event: Event) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, event["epoch"], walltime=self._began + event["time_s"])
        if event["event"] == "epoch":
            self._writer.flush()

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._print_failure

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """No traceback of the thread that writes, if the disk is to blame: the next `write` raises the same error."""
        is_writer = type(failure.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(failure.exc_value, OSError)):
            self._print_failure(failure)


class WeightsAndBiases(Tracker):
    """Takes WANDB_MODE=offline and WANDB's other variables. A server drops points of epochs that it has already."""

    name = "wandb"

    def __init__(self, run: Tracked) -> None:
        os.environ.setdefault(FLUSH_INTERVAL, "0.1")
        import wandb

        if not _is_offline() and wandb.api.api_key is None:  # on a terminal, `init` would wait for an answer
            raise RuntimeError("not logged in: `wandb login`, or WANDB_MODE=offline and `wandb sync` later")
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id,
            resume="allow",
            dir=str(run.directory),
            settings=wandb.Settings(silent=True, init_timeout=60, console="off"),
        )

    def _configure(self, config: dict[str, Any]) -> None:
        self._run.config.update(config, allow_val_change=True)

    def _add(self, values: dict[str, float], event: Event) -> None:
        # An epoch's line is the last of its step; uncommitted, W&B would hold it back until the next epoch's first.
        self._run.log(values, step=event["epoch"], commit=event["event"] == "epoch")

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """Takes MLFLOW_TRACKING_URI. The run is found again by the tag cupss.run_id."""

    name = "mlflow"

    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        ours = self._client.search_runs([experiment_id], f"tags.`cupss.run_id` = '{run.run_id}'", max_results=1)
        if not ours:
            tags = {"cupss.run_id": run.run_id}
            ours = [self._client.create_run(experiment_id, run_name=run.name, tags=tags)]
        self._run_id = ours[0].info.run_id
        self._client.update_run(self._run_id, status="RUNNING")
        self._began = run.began
        self._stored: dict[str, Counter[int]] = {}
        self._seen: Counter[tuple[str, int]] = Counter()
        for event in run.events:  # those that it does not have yet
            self.write(event)

    def _configure(self, config: dict[str, Any]) -> None:
        # As a file: a parameter cannot be changed, and a resume may have another place or save more often.
        self._client.log_dict(self._run_id, config, "config.yaml")

    def _add(self, values: dict[str, float], event: Event) -> None:
        from mlflow.entities import Metric

        at_ms = round(1000 * (self._began + event["time_s"]))
        metrics = [Metric(_without_unit(tag), value, at_ms, event["epoch"]) for tag, value in values.items()]
        self._client.log_batch(self._run_id, [metric for metric in metrics if self._is_new(metric.key, metric.step)])

    def _is_new(self, key: str, epoch: int) -> bool:
        """Whether the point is not there yet: a resume makes some again, with the same numbers.

        Points are counted, for an epoch may have several, as of two resizes.
        """
        if key not in self._stored:
            self._stored[key] = Counter(point.step for point in self._client.get_metric_history(self._run_id, key))
        self._seen[key, epoch] += 1
        return self._seen[key, epoch] > self._stored[key][epoch]

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class Trackio(Tracker):
    """Local by default, in Trackio's own folder (TRACKIO_DIR); `trackio show` opens it."""

    name = "trackio"

    def __init__(self, run: Tracked) -> None:
        import trackio

        self._run = trackio.init(project=run.project, name=run.unique_name, resume="allow", embed=False)

    def _configure(self, config: dict[str, Any]) -> None:
        self._run.config.update(config)

    def _add(self, values: dict[str, float], event: Event) -> None:
        self._run.log(values, step=event["epoch"])

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Tracked], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Name, which is also the package's, -> what makes the sink."""


def require_installed(trackers: Sequence[str]) -> None:
    """Raises ConfigError naming the first of the trackers whose package is missing."""
    for name in trackers:
        found = find_spec(name)
        if found is None or found.loader is None:  # a folder such as wandb/ in the working directory is no package
            raise ConfigError(f"run.trackers: {name} is not installed: `pip install {name}`, or leave it out")


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE") in ("offline", "disabled")


def _without_unit(tag: str) -> str:
    """MLflow takes no brackets and no percent signs."""
    return tag.partition("(")[0]
