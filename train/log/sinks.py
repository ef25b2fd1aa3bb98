"""Where a run's numbers go: JSON lines (the truth), the console, and trackers (views; train/log/trackers.py).

Only rank 0 has sinks; the other ranks hold an empty list of them, so no call site has to ask for the rank.
"""

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from train.errors import TrainError
from train.files import why_unwritten, write_durably

Event = dict[str, Any]


class Sink(Protocol):
    name: str
    """What the user calls it."""

    def write(self, event: Event) -> None:
        """Take one event: `event` names its kind, `time_s` is seconds since the run began, across resumes."""

    def progress(self, what: str, step: int, steps: int) -> None:
        """`step` of `steps` is done; called every step, so it must cost nothing to speak of."""

    def close(self) -> None: ...


class Sinks:
    """All sinks of this rank, possibly none. A sink that fails does not end a run."""

    def __init__(self, sinks: Sequence[Sink], log: "JsonLines | None" = None) -> None:
        """log: the one of the sinks that a checkpoint must remember the length of."""
        self._sinks = list(sinks)
        self._log = log
        self._log_fails = False

    @property
    def log_text(self) -> str:
        """The log so far; a resume brings the file back to what the checkpoint says."""
        return "" if self._log is None else self._log.text

    @property
    def unwritten(self) -> int:
        """Lines of the log that could not be written yet."""
        return 0 if self._log is None else self._log.unwritten

    def write(self, event: Event) -> None:
        """Give the event to all sinks. What fails is noted once: the log keeps its lines and tries again each time."""
        for sink in list(self._sinks):
            try:
                sink.write(event)
            except Exception as error:  # a tracker raises whatever it met
                if sink is self._log and not isinstance(error, OSError):
                    raise
                self._failed(sink, error, event)
            else:
                self._log_fails = self._log_fails and sink is not self._log

    def note(self, message: str, time_s: float) -> None:
        """Give all sinks a note for the user."""
        self.write({"event": "note", "time_s": time_s, "message": message})

    def sync_log(self) -> None:
        """See to it that a power cut takes nothing from the log that a checkpoint counts on. Raises OSError."""
        if self._log is not None:
            self._log.sync()

    def progress(self, what: str, step: int, steps: int) -> None:
        for sink in self._sinks:
            sink.progress(what, step, steps)

    def close(self) -> None:
        for sink in self._sinks:
            with suppress(Exception):  # what could not be written has been noted
                sink.close()

    def _failed(self, sink: Sink, error: Exception, event: Event) -> None:
        if sink is self._log:
            first, self._log_fails = not self._log_fails, True
            why = why_unwritten(error, self._log.path)
            message = f"cannot write the log: {why}; its lines are kept in memory and written later"
        else:
            self._sinks.remove(sink)
            first, message = True, f"{sink.name} can no longer be written and is left out: {error}"
        if first:
            self.note(message, event["time_s"])


class JsonLines:
    """`log.jsonl`: one object a line, written at once. All lines stay in memory, for the checkpoints hold them, too."""

    name = "log.jsonl"

    def __init__(self, path: Path, has_run: Callable[[bytes], bytes] = lambda found: b"") -> None:
        """has_run: is given what the file holds, and returns the whole lines after which the run goes on.

        What a killed run wrote behind them is cut off. A file that says something else becomes NAME.damaged.
        """
        self.path = path
        self._written = bytearray()
        self._pending: list[bytes] = []
        self._open()
        found = path.read_bytes()
        self._written += has_run(found)
        if found.startswith(self._written):
            self._file.truncate(len(self._written))
        else:
            self._rewrite(found)

    @property
    def text(self) -> str:
        """All lines so far, those included that the disk did not take yet."""
        return b"".join([self._written, *self._pending]).decode()

    @property
    def unwritten(self) -> int:
        return len(self._pending)

    def write(self, event: Event) -> None:
        """Raises OSError if the line, or one before it, is not on the disk yet; it is tried again with the next."""
        self._pending.append(json.dumps(event).encode() + b"\n")
        if not self.path.exists():  # the run directory was moved or removed
            lost = self._file
            self._open()
            lost.close()
            self._pending, self._written = self.text.encode().splitlines(keepends=True), bytearray()
        while self._pending:
            before, line = os.fstat(self._file.fileno()).st_size, self._pending[0]
            if self._file.write(line) < len(line):  # what a nearly full disk does
                self._file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._written += self._pending.pop(0)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def progress(self, what: str, step: int, steps: int) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when this process ends
        except BlockingIOError as error:
            raise TrainError(f"{self.path} is being written by another process: a run goes on there") from error
        self._file = file

    def _rewrite(self, found: bytes) -> None:
        """Put the lines so far in place of what was found; that is kept, unless it is their beginning."""
        if not self._written.startswith(found):
            write_durably(self.path.with_name(self.path.name + ".damaged"), found)
        self._file.truncate(0)
        if self._file.write(self._written) < len(self._written):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.sync()


class ConsoleSink:
    """Live progress on a terminal, one line an epoch and a resize everywhere, and the closing table."""

    name = "the console"

    def __init__(self, console: Console | None = None) -> None:
        # Wide enough for a table where no terminal says how wide it is (a log file, a pipe).
        self._console = console or Console(width=None if sys.stdout.isatty() else 120)
        self._epochs = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
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
        elif event["first_step"]:
            self._print(f"resumed at epoch {event['first_epoch']} of {self._epochs}, after step {event['first_step']}")
        elif event["first_epoch"] > 1:
            self._print(f"resumed at epoch {event['first_epoch']} of {self._epochs}")

    def _write_note(self, event: Event) -> None:
        self._print(f"note: {event['message']}")

    def _write_resize(self, event: Event) -> None:
        self._print(
            f"  resize at the {event['when']} of epoch {event['epoch']}: {_depth(event)} removed, FR "
            f"{event['flops_reduction_before']:.2f} -> {event['flops_reduction_after']:.2f} "
            f"in {event['seconds']:.2f} s{_losses(event)}, all ranks at {event['digest'][:12]}"
        )

    def _write_zero(self, event: Event) -> None:
        self._print(
            f"  zeroed at the {event['when']} of epoch {event['epoch']}: {_depth(event)}, shapes stay"
            f"{_losses(event)}, all ranks at {event['digest'][:12]}"
        )

    def _write_epoch(self, event: Event) -> None:
        seconds = event["seconds"]
        raw = "" if event["raw_top1"] is None else f" (average; weights {event['raw_top1']:.2f}%)"
        self._print(
            f"epoch {event['epoch']:>3}/{self._epochs}  loss {event['train_loss']:.4f}  "
            f"top-1 {event['top1']:6.2f}%{raw}  top-5 {event['top5']:6.2f}%  FR {event['flops_reduction']:.2f}  "
            f"{event['images_per_s']:,.0f} images/s  {event['image_size']} px  step {seconds['step']:.1f} s  "
            f"wait {seconds['data_wait']:.1f} s  eval {seconds['eval']:.1f} s"
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
            f"GPU hours{'' if event['device'] == 'cuda' else ' (CPU)'}"
        )
        self._print(f"log, curves and checkpoints: {event['directory']}")


def _depth(event: Event) -> str:
    """How deep a cut was: its height, where it had one, and channels."""
    t = event["threshold"]
    return ("" if t is None else f"t {t:.3f}, ") + f"{sum(event['removed'].values())} channels"


def _losses(event: Event) -> str:
    """What an action did to the loss, where both are finite."""
    before, after = event["loss_before"], event["loss_after"]
    return "" if before is None or after is None else f", loss {before:.3f} -> {after:.3f}"
