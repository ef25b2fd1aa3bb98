"""The savings table: a row for every group of equal runs, published rows beside them; Markdown for people, CSV for
programs."""

import csv
import io
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from launch.reports.published import TABLES, Result
from launch.reports.read import COMPARABLE, Group, Run


@dataclass(frozen=True)
class Spread:
    """Mean of repetitions; `deviation` is the sample standard deviation, None of a single value."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of one run. saving: percent of the dense runs' mean hours; changes: points against their mean accuracy.

    None where no dense run is comparable, or nobody knows the hours before.
    """

    run: Run
    saving: float | None
    change1: float | None
    change5: float | None

    @property
    def values(self) -> dict[str, float | None]:
        """The measured columns of the table."""
        done = self.run.done
        return {
            "reduction": done["flops_reduction"],
            "top1": done["top1"],
            "top5": done["top5"],
            "change1": self.change1,
            "change5": self.change5,
            "hours": self.run.hours,
            "saving": self.saving,
        }


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table, ours or published.

    source: "" for ours. hours: GPU hours, ranks x wall time where `on_cpu`.
    """

    name: str
    network: str
    method: str
    setting: str = ""
    source: str = ""
    count: int = 1
    seeds: str = ""
    on_cpu: bool = False
    reduction: Spread | None = None
    top1: Spread | None = None
    top5: Spread | None = None
    change1: Spread | None = None
    change5: Spread | None = None
    hours: Spread | None = None
    saving: Spread | None = None


MEASURES = ("reduction", "top1", "top5", "change1", "change5", "hours", "saving")
# (heading, field, decimals); the unit is in the heading
COLUMNS = (
    ("FR", "reduction", 2),
    ("top-1 (%)", "top1", 2),
    ("top-5 (%)", "top5", 2),
    ("top-1 against dense (points)", "change1", 2),
    ("GPU hours", "hours", 2),
    ("saving (%)", "saving", 1),
)


def outcomes(runs: list[Run]) -> list[Outcome]:
    """One a run, measured against the mean of the comparable dense runs among `runs`, where there are any."""
    found = []
    for run in runs:
        dense = [other for other in runs if other.is_dense and other.is_comparable(run)]
        if not dense or run.is_dense:
            found.append(Outcome(run, None, None, None))
            continue
        hours = statistics.mean(other.hours for other in dense)
        saving = 100 * (1 - run.hours / hours) if run.hours_are_known else None
        changes = (run.done[key] - statistics.mean(other.done[key] for other in dense) for key in ("top1", "top5"))
        found.append(Outcome(run, saving, *changes))
    return found


def our_rows(groups: list[Group]) -> list[Row]:
    """One a group: means and standard deviations over its runs."""
    measured = {id(outcome.run): outcome for outcome in outcomes([run for group in groups for run in group.runs])}
    return [row_of(group, [measured[id(run)] for run in group.runs]) for group in groups]


def row_of(group: Group, measured: list[Outcome]) -> Row:
    """The row of a group, `measured` being what came of its runs."""
    return Row(
        name=group.name,
        network=group.one.network,
        method=group.one.method,
        setting=setting(group.one),
        count=len(group.runs),
        seeds=", ".join(map(str, group.seeds)),
        on_cpu=group.one.done["device"] == "cpu",
        **{key: spread(outcome.values[key] for outcome in measured) for key in MEASURES},
    )


def published_rows(networks: Iterable[str]) -> list[Row]:
    """The published results of these networks, in the order of the published tables."""
    wanted = set(networks)
    return [_published(result) for table in TABLES for result in table.results if result.network in wanted]


def published_tables() -> list[tuple[str, list[Row]]]:
    """All that is published: (title, rows)."""
    return [(table.title, [_published(result) for result in table.results]) for table in TABLES]


def spread(values: Iterable[float | None]) -> Spread | None:
    """None where any value is missing."""
    known = list(values)
    if not known or None in known:
        return None
    return Spread(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None)


def setting(run: Run) -> str:
    """How a run shrank, in a few words; "" for a dense one and where an older log does not say."""
    if not run.shrinks or not run.settings:
        return f"from {run.first['from']}" if run.first["from"] else ""
    cup = {key: run.settings.get(f"cup.{key}") for key in _CUP}
    target = cup["target_reduction"]
    words = [f"k {cup['slope']:g}, b {cup['offset']:g}", f"stop at FR {target:g}" if target else "no stop"]
    if cup["ramp"] == "reduction":
        words = [f"FR {target:g} in a straight line by epoch {cup['last_epoch'] or run.first['epochs']}"]
    if cup["every"] != 1:
        words.append(f"every {cup['every']} epochs")
    if cup["round_to"] != 1:
        words.append(f"widths rounded to {cup['round_to']}")
    if cup["scope"] != "inner":
        words.append("residual streams too")
    return ", ".join(words)


_CUP = ("slope", "offset", "target_reduction", "ramp", "last_epoch", "every", "round_to", "scope")


def notes(groups: list[Group]) -> list[str]:
    """What a reader of the table must know of some of its runs."""
    found = []
    for outcome in outcomes([run for group in groups for run in group.runs]):
        run = outcome.run
        if run.first["from"] is not None:
            found.append(_hours_note(run))
        if not run.is_dense and outcome.saving is None and run.hours_are_known:
            equal = f"equal {', '.join(COMPARABLE)} and settings of data and train"
            found.append(f"{run.name}: no saving, for no dense run among these has {equal}")
    return found


def markdown(rows: list[Row]) -> str:
    """The table for people. Hours of a CPU run are marked as such."""
    headings = ("run", "network", "method", "runs", *(heading for heading, _, _ in COLUMNS))
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * 3}{'---:|' * (len(headings) - 3)}"]
    for row in rows:
        method = ", ".join(filter(None, [row.method, row.setting]))
        cells = [row.name, row.network, method, "" if row.source else str(row.count), *cells_of(row).values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cells_of(row: Row) -> dict[str, str]:
    """Heading -> text of the measured columns, with +- where there are several runs."""
    cells = {}
    for heading, field, digits in COLUMNS:
        value = getattr(row, field)
        if value is None:
            cells[heading] = ""
        elif field == "hours":
            cells[heading] = in_words(value, 4 if value.mean < 1 else digits) + (" (CPU)" if row.on_cpu else "")
        else:
            cells[heading] = in_words(value, digits, sign="+" if field == "change1" else "")
    return cells


def in_words(value: Spread, digits: int, sign: str = "") -> str:
    """sign: "+" shows that of positive numbers, too."""
    mean = f"{value.mean:{sign}.{digits}f}"
    return mean if value.deviation is None else f"{mean} ± {value.deviation:.{digits}f}"


def means_csv(rows: list[Row]) -> str:
    """A line a row in full precision: each measure's mean and standard deviation; what is not known is empty."""
    names = [f"{_CSV_NAMES[key]}{part}" for key in MEASURES for part in ("", "_deviation")]
    lines = [["name", "network", "method", "setting", "source", "runs", "seeds", *names, "device"]]
    for row in rows:
        values = [getattr(row, key) for key in MEASURES]
        numbers = [n for value in values for n in ((value.mean, value.deviation) if value else (None, None))]
        device = "" if row.source else "cpu" if row.on_cpu else "cuda"
        own = [row.name, row.network, row.method, row.setting, row.source or "ours", row.count, row.seeds]
        lines.append([*own, *numbers, device])
    return _comma_separated(lines)


def runs_csv(groups: list[Group]) -> str:
    """A line a run in full precision; what is not known is empty."""
    kinds = kinds_of(groups)
    names = [_CSV_NAMES[key] for key in MEASURES]
    lines = [
        [
            *("run", "group", "network", "data", "method", "setting", "seed", *names, "best_top1_percent"),
            *("flops", "macs", "params", "wall_s", *(f"{kind}_s" for kind in kinds), "ranks", "device"),
        ]
    ]
    group_of = {id(run): group.name for group in groups for run in group.runs}
    for outcome in outcomes([run for group in groups for run in group.runs]):
        run, done = outcome.run, outcome.run.done
        lines.append(
            [
                *(run.name, group_of[id(run)], run.network, run.data, run.method, setting(run), run.seed),
                *(outcome.values[key] for key in MEASURES),
                *(done.get(key) for key in ("best_top1", "flops", "macs", "params", "time_s")),
                *(done.get("seconds", {}).get(kind) for kind in kinds),
                *(run.first["world_size"], done["device"]),
            ]
        )
    return _comma_separated(lines)


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
}


def _published(result: Result) -> Row:
    """Its saving is against the dense network's hours, where both are published."""
    dense = next(
        other
        for table in TABLES
        for other in table.results
        if (other.network, other.method) == (result.network, "dense")
    )
    values: dict[str, Any] = {key: getattr(result, key, None) for key in MEASURES}
    if result.hours and dense.hours and result is not dense:
        values["saving"] = 100 * (1 - result.hours / dense.hours)
    return Row(
        name=f"published ({result.source})",
        network=result.network,
        method=result.method,
        setting=result.setting,
        source=result.source,
        **{key: None if value is None else Spread(value) for key, value in values.items()},
    )


def _hours_note(run: Run) -> str:
    """What the hours of a run that started from a checkpoint are made of."""
    own, before = run.done["gpu_hours"], run.first["gpu_hours_before"]
    if before is None:
        return f"{run.name}: GPU hours of its own alone; nobody knows those of the weights in {run.first['from']}"
    return f"{run.name}: {before:.4f} GPU hours went into {run.first['from']}, {own:.4f} into training it further"


def _comma_separated(lines: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
