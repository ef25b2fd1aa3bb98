"""The savings table: a row for every group of equal runs, published rows beside them; Markdown for people, CSV for
programs."""

import csv
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from launch.reports.published import TABLES, Measures, Result, Table
from launch.reports.read import Group, Run


@dataclass(frozen=True)
class Spread:
    """Mean of repetitions; `deviation` is the sample standard deviation, None of a single value."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    timed, scored: the dense runs that its hours and its accuracy are measured against: those of its own seed where each
    run of its group has such, else all that are comparable.
    """

    run: Run
    timed: list[Run]
    scored: list[Run]

    @property
    def saving(self) -> float | None:
        """Percent of the dense runs' mean hours; None without such runs, or where nobody knows the hours before."""
        if not self.timed or not self.run.hours_are_known:
            return None
        return 100 * (1 - self.run.hours / statistics.mean(peer.hours for peer in self.timed))

    @property
    def cpu_hours(self) -> float | None:
        """Hours of processor time of a CPU run; None where its log does not say, or it began from other weights."""
        seconds = self.run.done.get("cpu_seconds")
        return seconds / 3600 if seconds and self.run.first["from"] is None else None

    @property
    def cpu_saving(self) -> float | None:
        """Percent of the dense runs' mean processor time."""
        theirs = [Outcome(peer, [], []).cpu_hours for peer in self.timed]
        if self.cpu_hours is None or not theirs or None in theirs:
            return None
        return 100 * (1 - self.cpu_hours / statistics.mean(theirs))

    @property
    def scatter(self) -> float | None:
        """By how many percent the speed of the dense runs' own epochs varies: standard deviation over mean.

        Among epochs of equal image size, so that nothing but the machine makes a difference. Of several dense runs the
        largest.
        """
        found = [scatter for peer in self.timed if (scatter := _scatter_of_epochs(peer)) is not None]
        return max(found, default=None)

    def change(self, key: str) -> float | None:
        """Points against the dense runs' mean. key: "top1" or "top5"."""
        if not self.scored:
            return None
        return self.run.done[key] - statistics.mean(peer.done[key] for peer in self.scored)

    @property
    def values(self) -> dict[str, float | None]:
        """The measured columns of the table."""
        done = self.run.done
        return {
            "reduction": done["flops_reduction"],
            "top1": done["top1"],
            "top5": done["top5"],
            "change1": self.change("top1"),
            "change5": self.change("top5"),
            "hours": self.run.hours,
            "saving": self.saving,
            "gflops": done["flops"] / 1e9 if "flops" in done else None,
        }


@dataclass(frozen=True, kw_only=True)
class Row(Measures[Spread]):
    """One line of the table, ours or published.

    data: name of the data set, "" where a log does not say. source: "" for ours. hours: ranks x wall time if `on_cpu`.
    """

    name: str
    network: str
    data: str
    method: str
    setting: str = ""
    source: str = ""
    count: int = 1
    seeds: str = ""
    seed_count: int = 1
    """Different seeds among the runs: repetitions of one differ in accuracy by how sums round, if at all."""
    on_cpu: bool = False
    cpu_hours: Spread | None = None
    cpu_saving: Spread | None = None
    scatter: Spread | None = None
    """Of the dense runs' own epochs, percent: a saving below it may be chance."""

    @property
    def runs(self) -> str:
        """How many, and of how many seeds where these are fewer."""
        if self.seed_count == self.count:
            return str(self.count)
        return f"{self.count} of {self.seed_count} seed{'' if self.seed_count == 1 else 's'}"

    @property
    def saving_is_told_apart(self) -> bool:
        """Whether the saving is larger than what the machine does to equal epochs anyway."""
        return self.scatter is None or self.saving is None or abs(self.saving.mean) > self.scatter.mean


OF_ACCURACY = ("top1", "top5", "change1", "change5")
MEASURES = tuple(field.name for field in fields(Measures))
# (heading, field, decimals); the unit is in the heading
COLUMNS = (
    ("FR", "reduction", 2),
    ("top-1 (%)", "top1", 2),
    ("top-5 (%)", "top5", 2),
    ("top-1 against dense (points)", "change1", 2),
    ("GPU hours", "hours", 2),
    ("saving (%)", "saving", 1),
)
CPU_COLUMNS = (("CPU hours", "cpu_hours", 4), ("saving of CPU time (%)", "cpu_saving", 1))
SCATTER_COLUMNS = (("dense epochs vary by (%)", "scatter", 1),)
ALL_COLUMNS = (
    *COLUMNS[:4],
    ("top-5 against dense (points)", "change5", 2),
    ("GFLOPs", "gflops", 2),
    *COLUMNS[4:],
)


def columns_of(rows: Sequence["Row"]) -> tuple[tuple[str, str, int], ...]:
    """The columns of a table of ours: the usual ones, and those that some of the rows have."""
    some = [column for column in (*SCATTER_COLUMNS, *CPU_COLUMNS) if any(getattr(row, column[1]) for row in rows)]
    return (*COLUMNS, *some)


def outcomes(groups: list[Group]) -> list[tuple[Group, list[Outcome]]]:
    """What came of each group's runs, against the comparable dense runs, where there are any."""
    dense = _dense_runs(groups)
    return [
        (group, list(map(Outcome, group.runs, _peers(group, dense), _peers(group, dense, accuracy=True))))
        for group in groups
    ]


def our_rows(groups: list[Group]) -> list[Row]:
    """One a group: means and standard deviations over its runs."""
    return [row_of(group, measured) for group, measured in outcomes(groups)]


def row_of(group: Group, measured: list[Outcome]) -> Row:
    """The row of a group, `measured` being what came of its runs.

    What is measured against dense runs of the same seeds has the deviation of these differences, else (to first order)
    that of a difference of two means; none where only one of the two has repetitions.
    """
    spreads = {key: spread(outcome.values[key] for outcome in measured) for key in MEASURES}
    for key in OF_ACCURACY:
        spreads[key] = spread(_by_seed([(outcome.run, outcome.values[key]) for outcome in measured]))
    for key in ("change1", "change5", "saving"):
        spreads[key] = _with_dense_scatter(spreads[key], key, measured)
    return Row(
        name=group.name,
        network=group.one.network,
        data=group.one.data or "",
        method=group.one.method,
        setting=setting(group.one),
        count=len(group.runs),
        seeds=", ".join(map(str, group.seeds)),
        seed_count=len(set(group.seeds)) or len(group.runs),
        on_cpu=group.one.done["device"] == "cpu",
        cpu_hours=spread(outcome.cpu_hours for outcome in measured),
        cpu_saving=spread(outcome.cpu_saving for outcome in measured),
        scatter=_largest([outcome.scatter for outcome in measured]),
        **spreads,
    )


def published_rows(runs: Iterable[Run]) -> list[Row]:
    """The published results of these runs' networks on their data sets, in the order of the published tables."""
    runs = list(runs)
    return [
        _published(table, one) for table in tables_of(runs) for one in table.results if _is_beside(table, one, runs)
    ]


def tables_of(runs: Iterable[Run]) -> list[Table]:
    """The published tables that have such rows."""
    runs = list(runs)
    return [table for table in TABLES if any(_is_beside(table, result, runs) for result in table.results)]


def published_tables() -> list[tuple[str, list[Row]]]:
    """All that is published: (title, rows)."""
    return [(table.title, [_published(table, result) for result in table.results]) for table in TABLES]


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where any value is missing."""
    known = list(values)
    if not known or None in known:
        return None
    return Spread(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None)


def setting(run: Run) -> str:
    """What a run started from and how it shrank, in a few words; an older log does not say how."""
    words = [f"from {run.first['from']}"] if run.first["from"] else []
    if not run.shrinks or not run.settings:
        return ", ".join(words)
    prune = {key.removeprefix("prune."): value for key, value in run.settings.items() if key.startswith("prune.")}
    words += _how_deep(prune, prune["last_epoch"] or run.first["epochs"])
    if prune["every"] != 1:
        words.append(f"every {prune['every']} epochs")
    if prune["round_to"] != 1:
        rounded = "as measured" if prune["round_to"] == "measured" else f"to {prune['round_to']}"
        words.append(f"widths rounded {rounded}")
    if prune["scope"] != "inner":
        words.append("residual streams too")
    if prune.get("drop_blocks"):
        words.append("whole blocks too")
    return ", ".join(words)


def notes(groups: list[Group]) -> list[str]:
    """What a reader of the table must know of some of its runs."""
    dense = _dense_runs(groups)
    found = []
    for group in groups:
        found += [note for run in group.runs if (note := _gaps_note(run))]
        found += [_hours_note(run) for run in group.runs if run.first["from"] is not None]
        if not group.one.is_dense:
            found += _missing_note(group, dense)
    return found


def markdown(rows: list[Row]) -> str:
    """The table for people. Hours of a CPU run are marked as such."""
    keys = telling(rows, "network")
    columns = columns_of(rows)
    headings = ("run", *keys, "method", "runs", *(heading for heading, _, _ in columns))
    texts = 2 + len(keys)
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * texts}{'---:|' * (len(headings) - texts)}"]
    for row in rows:
        cells = [row.name, *(getattr(row, key) for key in keys), method_of(row), "" if row.source else row.runs]
        cells = [cell.replace("|", "\\|") for cell in cells]  # a folder may be called so
        lines.append(f"| {' | '.join([*cells, *cells_of(row, columns).values()])} |")
    return "\n".join(lines) + "\n"


def _scatter_of_epochs(run: Run) -> float | None:
    """Percent; None of fewer than three epochs of the last image size."""
    size = run.epochs[-1].get("image_size")
    seconds = [1 / line["images_per_s"] for line in run.epochs if line.get("image_size") == size]
    return 100 * statistics.stdev(seconds) / statistics.mean(seconds) if len(seconds) > 2 else None


def _largest(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(max(known)) if known else None


def _by_seed(values: Iterable[tuple[Run, float | None]]) -> list[float | None]:
    """A value for each seed, the mean of its repetitions; for each run where a log does not say its seed."""
    found: dict[object, list[float | None]] = {}
    for run, value in values:
        found.setdefault(run.name if run.seed is None else run.seed, []).append(value)
    return [None if None in same else statistics.mean(same) for same in found.values()]


def _how_deep(prune: dict[str, Any], last_epoch: int) -> list[str]:
    """What a method was told of how much should go, in a few words. prune: the settings without their prefix."""
    method, target = prune["method"], prune["target_reduction"]
    goal = f"FR {target:g}" if target else ""
    if speedup := prune.get("target_speedup"):
        device = "the device at hand" if prune["device"] == "measured" else prune["device"]
        goal = f"a step {speedup:g} times faster on {device}"
    stop = f"stop at {goal}" if goal else "no stop"
    if method == "hard_ramp" and prune["hard_ramp.kind"] != "threshold":
        return [f"{goal} in a straight line by epoch {last_epoch}"]
    if method == "hard_ramp":
        return [f"k {prune['hard_ramp.slope']:g}, b {prune['hard_ramp.offset']:g}", stop]
    if method == "soft_rate":
        return [goal or f"{prune['soft_rate.rate']:.0%} of each layer"]
    if method == "prune_train":
        return [f"penalty {prune['prune_train.share']:.0%}", stop]
    return [goal] if method == "early" else []


def telling(rows: Sequence[Row], *always: str) -> list[str]:
    """Which of "network" and "data" a table of these rows names: those in which ours differ, and `always`."""
    ours = [row for row in rows if not row.source]
    return [key for key in ("network", "data") if key in always or len({getattr(row, key) for row in ours}) > 1]


def method_of(row: Row) -> str:
    return ", ".join(filter(None, [row.method, row.setting]))


def cells_of(row: Row, columns: Sequence[tuple[str, str, int]] = COLUMNS) -> dict[str, str]:
    """Heading -> text of the measured columns, with +- where there are several runs."""
    cells = {}
    for heading, field, digits in columns:
        value = getattr(row, field)
        if value is None:
            cells[heading] = ""
        elif field == "hours":
            cells[heading] = in_words(value, 4 if value.mean < 1 else digits) + (" (CPU)" if row.on_cpu else "")
        else:
            cells[heading] = in_words(value, digits, sign="+" if field.startswith("change") else "")
    return cells


def in_words(value: Spread, digits: int, sign: str = "") -> str:
    """sign: "+" shows that of positive numbers, too."""
    mean = f"{value.mean:{sign}.{digits}f}"
    return mean if value.deviation is None else f"{mean} ± {value.deviation:.{digits}f}"


def means_csv(rows: list[Row]) -> str:
    """A line a row in full precision: each measure's mean and standard deviation; what is not known is empty."""
    lines = []
    for row in rows:
        measures = {}
        for key in MEASURES:
            value = getattr(row, key)
            measures[_CSV_NAMES[key]] = value and value.mean
            measures[f"{_CSV_NAMES[key]}_deviation"] = value and value.deviation
        lines.append(
            {
                "name": row.name,
                "network": row.network,
                "data": row.data,
                "method": row.method,
                "setting": row.setting,
                "source": row.source or "ours",
                "runs": row.count,
                "seeds": row.seeds,
                **measures,
                "cpu_hours": row.cpu_hours and row.cpu_hours.mean,
                "cpu_saving_percent": row.cpu_saving and row.cpu_saving.mean,
                "dense_epochs_vary_percent": row.scatter and row.scatter.mean,
                "device": "" if row.source else "cpu" if row.on_cpu else "cuda",
            }
        )
    return _comma_separated(lines)


def runs_csv(groups: list[Group]) -> str:
    """A line a run in full precision; what is not known is empty."""
    kinds = kinds_of(groups)
    return _comma_separated(
        [
            {
                "run": outcome.run.name,
                "group": group.name,
                "network": outcome.run.network,
                "data": outcome.run.data,
                "method": outcome.run.method,
                "setting": setting(outcome.run),
                "seed": outcome.run.seed,
                **{_CSV_NAMES[key]: value for key, value in outcome.values.items()},
                "best_top1_percent": outcome.run.done.get("best_top1"),
                **{key: outcome.run.done.get(key) for key in ("macs", "params")},
                "cpu_s": outcome.run.done.get("cpu_seconds"),
                "wall_s": outcome.run.done.get("time_s"),
                **{f"{kind}_s": outcome.run.done.get("seconds", {}).get(kind) for kind in kinds},
                "ranks": outcome.run.first["world_size"],
                "device": outcome.run.done["device"],
            }
            for group, measured in outcomes(groups)
            for outcome in measured
        ]
    )


def kinds_of(groups: list[Group]) -> list[str]:
    """Kinds of seconds that any of the runs has spent, in the ledger's order."""
    spent = [run.done.get("seconds", {}) for group in groups for run in group.runs]
    return [
        kind for kind in dict.fromkeys(kind for one in spent for kind in one) if any(one.get(kind) for one in spent)
    ]


_CSV_NAMES = {
    "reduction": "flops_reduction",
    "top1": "top1_percent",
    "top5": "top5_percent",
    "change1": "top1_change_points",
    "change5": "top5_change_points",
    "hours": "gpu_hours",
    "saving": "saving_percent",
    "gflops": "gflops",
}


def _dense_runs(groups: list[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs if run.is_dense]


def _peers(group: Group, dense: list[Run], *, accuracy: bool = False) -> list[list[Run]]:
    """For each run of the group the dense runs that it is measured against."""
    if group.one.is_dense:
        return [[] for _ in group.runs]
    peers = [other for other in dense if not other.differences(group.one, accuracy=accuracy)]
    by_seed = [[peer for peer in peers if peer.seed == run.seed] for run in group.runs]
    # Two runs of one seed would share their dense runs, whose scatter would then be missing from the differences.
    is_paired = len(set(group.seeds)) == len(group.runs) and all(by_seed)
    return by_seed if is_paired else [peers for _ in group.runs]


def _with_dense_scatter(value: Spread | None, key: str, measured: list[Outcome]) -> Spread | None:
    """A spread of differences, with the scatter of the dense runs where these are the same for all of them."""
    if value is None or value.deviation is None:
        return value
    peers = [outcome.timed if key == "saving" else outcome.scored for outcome in measured]
    if peers[0] != peers[1]:
        return value  # seed by seed: it is in the differences
    if len(peers[0]) == 1:
        return Spread(value.mean)
    if key == "saving":
        hours = spread(peer.hours for peer in peers[0])
        theirs = (100 - value.mean) * hours.deviation / hours.mean  # of the quotient of hours
    else:
        scores = spread(_by_seed([(peer, peer.done[key.replace("change", "top")]) for peer in peers[0]]))
        if scores.deviation is None:
            return Spread(value.mean)
        theirs = scores.deviation
    return Spread(value.mean, math.hypot(value.deviation, theirs))


def _missing_note(group: Group, dense: list[Run]) -> list[str]:
    """Why a group has no saving or no change of accuracy, for want of a comparable dense run."""
    for accuracy, missing in ((False, "no saving and no change of accuracy"), (True, "no change of accuracy")):
        differences = {run.name: run.differences(group.one, accuracy=accuracy) for run in dense}
        if not differences:
            return [f"{group.name}: {missing}, for no run among these is dense"]
        if all(differences.values()):
            name, keys = min(differences.items(), key=lambda item: len(item[1]))
            return [f"{group.name}: {missing}, for the nearest dense run, {name}, differs in {', '.join(keys)}"]
    return []


def _is_beside(table: Table, result: Result, runs: list[Run]) -> bool:
    return any(
        run.network == result.network and table.data.is_that_of(run.data, run.first["train_images"]) for run in runs
    )


def _published(table: Table, result: Result) -> Row:
    """Its saving is against the dense network's hours, where both are published."""
    dense = next(
        other for one in TABLES for other in one.results if (other.network, other.method) == (result.network, "dense")
    )
    values = {key: getattr(result, key) for key in MEASURES}
    if result.hours and dense.hours and result is not dense:
        values["saving"] = 100 * (1 - result.hours / dense.hours)
    return Row(
        name=f"published, {table.data.name} ({result.source})",
        network=result.network,
        data=table.data.name,
        method=result.method,
        setting=result.setting,
        source=result.source,
        **{key: None if value is None else Spread(value) for key, value in values.items()},
    )


def _gaps_note(run: Run) -> str | None:
    """Which epochs the log lacks, as after it was cut short or deleted; None where it has all."""
    there = sorted({event["epoch"] for event in run.epochs})
    ends = itertools.pairwise([0, *there, run.done.get("epoch", there[-1]) + 1])
    gaps = [(a + 1, b - 1) for a, b in ends if b - a > 1]
    missing = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in gaps)
    return f"{run.name}: its log lacks epochs {missing}; the figures show what is there" if gaps else None


def _hours_note(run: Run) -> str:
    """What the hours of a run that started from a checkpoint are made of."""
    own, before = run.done["gpu_hours"], run.first["gpu_hours_before"]
    if before is None:
        return f"{run.name}: GPU hours of its own alone; nobody knows those of the weights in {run.first['from']}"
    return f"{run.name}: {before:.4f} GPU hours went into {run.first['from']}, {own:.4f} into training it further"


def _as_text(value: Any) -> Any:
    """Words that a spreadsheet takes for words: what begins as a formula does would be computed when it is opened."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def _comma_separated(lines: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _as_text(value) for key, value in line.items()} for line in lines)
    return text.getvalue()
