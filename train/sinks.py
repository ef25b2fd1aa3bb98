"""Where a run's numbers go: JSON lines (the truth), TensorBoard (a view), and the console.

Only rank 0 has sinks; the other ranks hold an empty list of them, so nobody asks for the rank at the call sites.
"""

import fcntl
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from train.errors import TrainError

Event = dict[str, Any]


class Sink(Protocol):
    def write(self, event: Event) -> None:
        """Take one event: `event` names its kind, `time_s` is seconds since the run began, across resumes."""

    def progress(self, what: str, step: int, steps: int) -> None:
        """`step` of `steps` is done; called every step, so it must cost nothing to speak of."""

    def close(self) -> None: ...


class Sinks:
    """All sinks of this rank behind one face; possibly none."""

    def __init__(self, sinks: Sequence[Sink], log: "JsonLines | None" = None) -> None:
        """log: the one of the sinks that a checkpoint must remember the length of."""
        self._sinks = sinks
        self._log = log

    @property
    def log_bytes(self) -> int:
        """Length of the log now; a resume cuts it back to what the checkpoint says."""
        return 0 if self._log is None else self._log.size

    def write(self, event: Event) -> None:
        for sink in self._sinks:
            sink.write(event)

    def progress(self, what: str, step: int, steps: int) -> None:
        for sink in self._sinks:
            sink.progress(what, step, steps)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """`log.jsonl`: one object a line, flushed at once."""

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        """keep_bytes: where a resumed run goes on; what a killed run wrote after its last checkpoint is cut off."""
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when this process ends
        except BlockingIOError as error:
            raise TrainError(f"{path} is being written by another process: a run goes on there") from error
        if keep_bytes is not None:
            self._file.truncate(keep_bytes)

    @property
    def size(self) -> int:
        """Bytes written so far, for the checkpoint."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, event: Event) -> None:
        try:
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainError(f"cannot write {self._path}: {error.strerror}; the same command goes on later") from error

    def progress(self, what: str, step: int, steps: int) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """The epoch and resize events as curves, with the unit in each tag; the x axis is the epoch."""

    # (tag, key of the epoch event, factor)
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
        ("time/gpu_hours(h)", "gpu_hours", 1),
    )

    def __init__(self, directory: Path, from_epoch: int) -> None:
        """from_epoch: the first epoch that this process writes; viewers drop what a killed run wrote from there on."""
        from torch.utils.tensorboard import SummaryWriter  # its import takes seconds, and rank 0 alone needs it

        self._writer = SummaryWriter(str(directory), purge_step=from_epoch)

    def write(self, event: Event) -> None:
        if event["event"] == "run":
            self._writer.add_text("config", f"```\n{yaml.safe_dump(event['config'], sort_keys=False)}```")
        elif event["event"] == "epoch":
            self._write_epoch(event)
        elif event["event"] == "resize":
            self._writer.add_scalar("cup/removed(channels)", sum(event["removed"].values()), event["epoch"])
            self._writer.add_scalar("cup/resize(s)", event["seconds"], event["epoch"])

    def _write_epoch(self, event: Event) -> None:
        epoch = event["epoch"]
        for tag, key, factor in self.SCALARS:
            if event[key] is not None:
                self._writer.add_scalar(tag, event[key] * factor, epoch)
        for kind, seconds in event["seconds"].items():
            self._writer.add_scalar(f"time/{kind}(s)", seconds, epoch)
        for group, width in event["widths"].items():
            self._writer.add_scalar(f"widths/{group}(channels)", width, epoch)
        self._writer.flush()

    def progress(self, what: str, step: int, steps: int) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


class ConsoleSink:
    """Live progress on a terminal, one line an epoch and a resize everywhere, and the closing table."""

    def __init__(self, console: Console | None = None) -> None:
        # Wide enough for a table where no terminal says how wide it is (a log file, a pipe).
        self._console = console or Console(width=None if sys.stdout.isatty() else 120)
        self._epochs = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def write(self, event: Event) -> None:
        self._hide_bar()
        writer = getattr(self, f"_write_{event['event']}", None)
        if writer is not None:
            writer(event)

    def progress(self, what: str, step: int, steps: int) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(what, total=steps)
        self._bar.update(self._task, description=what, completed=step, total=steps)

    def close(self) -> None:
        self._hide_bar()

    def _hide_bar(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._bar.stop()
            self._task = None

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _write_run(self, event: Event) -> None:
        self._epochs = event["epochs"]
        devices = ", ".join(sorted(set(event["devices"])))
        self._print(
            f"{event['directory']}: {event['model']}, {event['dense_params'] / 1e6:.2f} M parameters, "
            f"{event['dense_flops'] / 1e9:.3f} GFLOPs; {event['world_size']} rank(s) on {devices}, "
            f"{event['precision']}, loader {event['loader']}"
        )
        if event["first_epoch"] > self._epochs:
            self._print("resumed: all epochs are done already")
        elif event["first_epoch"] > 1:
            self._print(f"resumed at epoch {event['first_epoch']} of {self._epochs}")

    def _write_note(self, event: Event) -> None:
        self._print(f"note: {event['message']}")

    def _write_resize(self, event: Event) -> None:
        self._print(
            f"  resize before epoch {event['epoch']}: t {event['threshold']:.3f}, {sum(event['removed'].values())} "
            f"channels gone, FR {event['flops_reduction_before']:.2f} -> {event['flops_reduction_after']:.2f} "
            f"in {event['seconds']:.2f} s, all ranks at {event['digest'][:12]}"
        )

    def _write_epoch(self, event: Event) -> None:
        seconds = event["seconds"]
        self._print(
            f"epoch {event['epoch']:>3}/{self._epochs}  loss {event['train_loss']:.4f}  top-1 {event['top1']:6.2f}%  "
            f"top-5 {event['top5']:6.2f}%  FR {event['flops_reduction']:.2f}  {event['images_per_s']:,.0f} images/s  "
            f"step {seconds['step']:.1f} s  wait {seconds['data_wait']:.1f} s  eval {seconds['eval']:.1f} s"
        )

    def _write_done(self, event: Event) -> None:
        table = Table(title=f"{event['directory']}: done")
        for column in ("cost of one image", "dense", "now", "reduction"):
            table.add_column(column, justify="right" if column != "cost of one image" else "left")
        for label, key in (("FLOPs (paper's counting)", "flops"), ("multiply-adds", "macs"), ("parameters", "params")):
            dense, now = event[f"dense_{key}"], event[key]
            table.add_row(label, f"{dense / 1e6:,.3f} M", f"{now / 1e6:,.3f} M", f"{dense / now:.2f} x")
        self._console.print(table)
        self._print(
            f"top-1 {event['top1']:.2f}% (best {event['best_top1']:.2f}%), top-5 {event['top5']:.2f}%, "
            f"{event['resizes']} resizes, {event['time_s']:.1f} s, {event['gpu_hours']:.4f} "
            f"{'GPU' if event['device'] == 'cuda' else 'process'} hours"
        )
        self._print(f"log, curves and checkpoints: {event['directory']}")
