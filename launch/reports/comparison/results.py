"""The finished runs of a grid -> rows, and the hours that they are compared by."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launch.grids.disk import Cost, Disk
from launch.grids.grid import DENSE, Entry, Grid
from launch.grids.jobs import Job
from launch.grids.stages import spent
from launch.reports.read import Run, read_run
from train.errors import TrainError


@dataclass(frozen=True)
class Point:
    """A finished run. cost: with the training of the network that it was cut from, and of commands before it."""

    job: Job
    run: Run
    cost: Cost


@dataclass(frozen=True)
class Row:
    """An entry at a setting: its finished runs, one a seed."""

    entry: Entry
    setting: str
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.entry.name, self.setting]))

    @property
    def one(self) -> Run:
        """A run that stands for all of them."""
        return self.points[0].run

    def by_seed(self, value: Callable[[Point], float]) -> dict[int, float]:
        return {point.job.seed: value(point) for point in self.points}


@dataclass(frozen=True)
class Currency:
    """What runs are compared by. note: why this."""

    name: str
    note: str
    hours: Callable[[Point], float]


@dataclass(frozen=True)
class Comparison:
    """The finished runs of a grid. missing: names of jobs that are not finished, or that another run stands for."""

    grid: Grid
    rows: tuple[Row, ...]
    currency: Currency
    missing: tuple[str, ...]

    def row(self, entry: str, setting: str) -> Row | None:
        """The entry's row at this setting, or its only one, where settings make no difference to it."""
        found = {row.setting: row for row in self.rows if row.entry.name == entry}
        return found.get(setting, found.get(""))

    def dense(self, row: Row) -> Row | None:
        return self.row(DENSE, row.setting)

    @property
    def methods(self) -> list[Row]:
        return [row for row in self.rows if not row.entry.is_control]

    def controls_of(self, method: Row) -> list[Row]:
        """What a method has to beat, in the order of the grid's file: controls of all methods, and its own."""
        found = [self.row(entry.name, method.setting) for entry in self.grid.controls]
        return [row for row in found if row is not None and row.entry.of in (None, method.entry.name)]


def read_comparison(grid: Grid, jobs: Mapping[str, Job], disk: Disk, finished: list[str]) -> Comparison:
    """finished: the jobs that are, and that are the grid's. Raises TrainError where there are none."""
    if not any(jobs[name].entry.role != "before" for name in finished):
        raise TrainError(f"{grid.out}: no run of this comparison is finished, so there is nothing to report")
    shown = [name for name in finished if jobs[name].entry.role != "before"]
    points = [Point(jobs[name], read_run(disk.run_dir(name).path), spent(jobs[name], jobs, disk)) for name in shown]
    members: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        members.setdefault((point.job.entry.name, point.job.setting), []).append(point)
    order = list(grid.entries)
    rows = [Row(ones[0].job.entry, setting, tuple(ones)) for (_, setting), ones in members.items()]
    rows.sort(
        key=lambda row: (list(grid.settings).index(row.setting) if row.setting else -1, order.index(row.entry.name))
    )
    missing = tuple(name for name in jobs if name not in finished)
    return Comparison(grid, tuple(rows), _currency(points), missing)


def spread_of(values: Mapping[int, float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation over seeds, None for a single one."""
    known = list(values.values())
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None


def changes(row: Row, dense: Row | None, value: Callable[[Point], float]) -> dict[int, float]:
    """Seed -> difference to the dense run of the same seed, of the seeds that have one."""
    theirs = {} if dense is None else dense.by_seed(value)
    return {seed: own - theirs[seed] for seed, own in row.by_seed(value).items() if seed in theirs}


def top1(point: Point) -> float:
    return point.run.done["top1"]


def top5(point: Point) -> float:
    return point.run.done["top5"]


def reduction(point: Point) -> float:
    return point.run.done["flops_reduction"]


def _currency(points: list[Point]) -> Currency:
    devices = {point.run.done["device"] for point in points}
    if devices == {"cpu"} and all(point.cost.cpu is not None for point in points):
        note = "CPU time of all processes, for all runs were on CPUs: other work changes it less than wall time"
        return Currency("CPU hours", note, lambda point: point.cost.cpu)
    if "cpu" in devices:
        name, why = "GPU hours", "not every run was on a GPU, nor is every run's CPU time known"
        return Currency(
            name, f"{why}: wall time x ranks, in which other work on the machine shows", lambda p: p.cost.wall
        )
    return Currency("GPU hours", "wall time x GPUs", lambda point: point.cost.wall)
