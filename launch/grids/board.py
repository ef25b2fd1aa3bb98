"""What is shown while a grid runs: a live table on a terminal, else a line when something happens and now and then."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.grids.disk import Disk
from launch.grids.jobs import Job
from launch.grids.runner import ENDED_BADLY, State, Status

LINE_EVERY_S = 60.0
LOOK_EVERY_S = 1.0
AROUND_ROWS = 5
"""Lines of a table that are no rows, and one to spare."""
STYLES = {
    State.DONE: "green",
    State.RUNNING: "bold cyan",
    State.ELSEWHERE: "cyan",
    State.FAILED: "bold red",
    State.REFUSED: "red",
    State.BLOCKED: "red",
    State.STOPPED: "yellow",
}


@dataclass(frozen=True)
class Progress:
    """How far a run is. an_epoch_s: wall seconds of one so far, None before the first is finished."""

    epoch: int
    epochs: int
    top1: float | None = None
    reduction: float | None = None
    an_epoch_s: float | None = None

    @property
    def left(self) -> int:
        return self.epochs - self.epoch


class Board(Protocol):
    def show(self, statuses: Mapping[str, Status]) -> None:
        """Called several times a second."""

    def close(self) -> None: ...


def open_board(jobs: Mapping[str, Job], disk: Disk, at_a_time: int) -> Board:
    console = Console()
    watch = Progresses(jobs, disk)
    return LiveTable(console, watch, at_a_time) if console.is_terminal else Lines(watch, at_a_time)


class Progresses:
    """How far each run is, by its log; a log is read again when it has changed."""

    def __init__(self, jobs: Mapping[str, Job], disk: Disk) -> None:
        self.jobs, self._disk = jobs, disk
        self._known: dict[str, tuple[Any, Progress]] = {}

    def of(self, name: str) -> Progress:
        log = self._disk.run_dir(name).log
        try:
            stat = log.stat()
        except OSError:
            return Progress(0, self.jobs[name].config.train.epochs)
        version = (stat.st_mtime_ns, stat.st_size)
        if self._known.get(name, (None,))[0] != version:
            self._known[name] = (version, _progress(self._disk.events(name), self.jobs[name].config.train.epochs))
        return self._known[name][1]

    def seconds_left(self, statuses: Mapping[str, Status], at_a_time: int) -> float | None:
        """Of the whole, at the pace of the epochs so far; None before there is one."""
        progress = {name: self.of(name) for name in statuses}
        paces = [one.an_epoch_s for one in progress.values() if one.an_epoch_s is not None]
        if not paces:
            return None
        usual = statistics.mean(paces)
        open_ones = [name for name, status in statuses.items() if status.state not in (State.DONE, *ENDED_BADLY)]
        left = [progress[name].left * (progress[name].an_epoch_s or usual) for name in open_ones]
        return max([sum(left) / at_a_time, *left], default=0.0)


class Lines:
    """For a file or a pipe."""

    def __init__(self, watch: Progresses, at_a_time: int) -> None:
        self._watch, self._at_a_time = watch, at_a_time
        self._shown: dict[str, State] = {}
        self._line_at = time.monotonic()

    def show(self, statuses: Mapping[str, Status]) -> None:
        for name, status in statuses.items():
            if self._shown.get(name, State.WAITING) is not status.state:
                print(f"{_count(statuses)} {_event(name, status, self._watch.of(name))}", flush=True)
            self._shown[name] = status.state
        if time.monotonic() - self._line_at > LINE_EVERY_S:
            self._line_at = time.monotonic()
            running = [name for name, status in statuses.items() if status.state is State.RUNNING]
            how_far = ", ".join(
                f"{name} (epoch {one.epoch}/{one.epochs})" for name in running if (one := self._watch.of(name))
            )
            print(f"{_count(statuses)} running: {how_far}; {self._left(statuses)}", flush=True)

    def close(self) -> None:
        pass

    def _left(self, statuses: Mapping[str, Status]) -> str:
        return left_in_words(self._watch.seconds_left(statuses, self._at_a_time))


class LiveTable:
    """How much is done and left, what went wrong, and a table: a row a method and setting, a column a seed."""

    def __init__(self, console: Console, watch: Progresses, at_a_time: int) -> None:
        self._watch, self._at_a_time = watch, at_a_time
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()
        self._looked_at = float("-inf")
        self._statuses: Mapping[str, Status] = {}

    def show(self, statuses: Mapping[str, Status]) -> None:
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        self._live.update(self._drawn(statuses), refresh=True)
        self._statuses = statuses

    def close(self) -> None:
        self._looked_at = float("-inf")
        if self._statuses:
            self.show(self._statuses)
        self._live.stop()

    def _drawn(self, statuses: Mapping[str, Status]) -> Group:
        jobs = self._watch.jobs
        seeds = list(dict.fromkeys(job.seed for job in jobs.values()))
        table = Table()
        table.add_column("method or control")
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right", no_wrap=True)
        rows: dict[str, dict[int, str]] = {}
        for name, job in jobs.items():
            rows.setdefault(" ".join(filter(None, [job.entry.name, job.setting])), {})[job.seed] = name
        bad = [f"{name}: {one.state.value}, {one.why}" for name, one in statuses.items() if one.state in ENDED_BADLY]
        left = left_in_words(self._watch.seconds_left(statuses, self._at_a_time))
        above = [Text(f"{_count(statuses)} {left}"), *(Text(line, style="red") for line in bad)]
        console = self._live.console
        room = console.height - AROUND_ROWS - sum(len(line.wrap(console, console.width)) for line in above)
        runs = [any(statuses[one].state is State.RUNNING for one in names.values()) for names in rows.values()]
        shown = _window(runs, room)
        for label, names in list(rows.items())[shown]:
            table.add_row(label, *(self._cell(names[seed], statuses) for seed in seeds))
        return Group(*above, table)

    def _cell(self, name: str, statuses: Mapping[str, Status]) -> Text:
        status, progress = statuses[name], self._watch.of(name)
        style = STYLES.get(status.state, "dim")
        if status.state is State.DONE:
            return Text("done" if progress.top1 is None else f"{progress.top1:.2f}%", style=style)
        if status.state is State.RUNNING or progress.epoch:
            words = f"{progress.epoch}/{progress.epochs}"
            if status.state is State.RUNNING and progress.an_epoch_s is not None:
                words += f", {in_words(progress.left * progress.an_epoch_s)}"
            return Text(words if status.state in (State.RUNNING, State.WAITING) else status.state.value, style=style)
        return Text(status.state.value, style=style)


def _window(runs: list[bool], room: int) -> slice:
    """Which rows to show where there is room for so many; runs: whether something runs in each."""
    first = runs.index(True) if True in runs else len(runs)
    start = max(0, min(first - 1, len(runs) - room))
    return slice(start, start + max(1, room))


def in_words(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def left_in_words(seconds: float | None) -> str:
    return (
        "time left unknown before a first epoch is finished" if seconds is None else f"about {in_words(seconds)} left"
    )


def _count(statuses: Mapping[str, Status]) -> str:
    done = sum(status.state is State.DONE for status in statuses.values())
    return f"[{done}/{len(statuses)} done]"


def _event(name: str, status: Status, progress: Progress) -> str:
    if status.state is State.DONE:
        result = "" if progress.top1 is None else f": top-1 {progress.top1:.2f}%, FR {progress.reduction:.2f}"
        return f"done: {name}{result}"
    if status.state is State.RUNNING:
        return f"{'goes on' if progress.epoch else 'started'}: {name}"
    return f"{status.state.value}: {name}{f': {status.why}' if status.why else ''}"


def _progress(events: list[dict[str, Any]], epochs: int) -> Progress:
    lines = [event for event in events if event["event"] == "epoch"]
    starts = [event for event in events if event["event"] == "run"]
    total = starts[-1]["epochs"] if starts else epochs
    if not lines:
        return Progress(0, total)
    last = lines[-1]
    return Progress(
        last["epoch"], total, last["top1"], last["flops_reduction"], an_epoch_s=last["time_s"] / last["epoch"]
    )
