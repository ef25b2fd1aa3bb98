"""All rows of a comparison, and the slides' two tables, measured beside published."""

from collections.abc import Mapping
from dataclasses import dataclass

from launch.reports.comparison.results import Comparison, Row, changes, reduction, spread_of, top1, top5
from launch.reports.published import DROPS, Result
from launch.reports.tables import Spread, in_words

RETRAINED = {True: "retrained", False: "no retraining"}
TITLES = {True: "With retraining", False: "Without retraining"}


@dataclass(frozen=True)
class Table:
    """texts: how many columns hold words, from the left."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    texts: int


def all_rows(comparison: Comparison) -> Table:
    """Methods and controls: what they reached and what they cost."""
    hours = comparison.currency.hours
    lines = []
    for row in comparison.rows:
        dense = comparison.dense(row)
        own = row.by_seed(hours)
        theirs = {} if dense is None else dense.by_seed(hours)
        savings = {seed: 100 * (1 - cost / theirs[seed]) for seed, cost in own.items() if seed in theirs}
        is_dense = row is dense
        lines.append(
            [
                row.name,
                "control" if row.entry.is_control else "retrained" if row.entry.is_retrained else "method",
                _counted(row),
                _words(row.by_seed(reduction), 2),
                _words(row.by_seed(top1), 2),
                "" if is_dense else _words(changes(row, dense, top1), 2, "+"),
                _words(row.by_seed(top5), 2),
                _words(own, 4 if max(own.values()) < 1 else 2),
                "" if is_dense else _words(savings, 1),
            ]
        )
    headings = ["name", "kind", "runs", "FR", "top-1 (%)", "against dense (points)", "top-5 (%)"]
    headings += [comparison.currency.name, "saving (%)"]
    return Table("Methods and controls", headings, lines, texts=3)


def slides_table(comparison: Comparison, retrained: bool) -> Table:
    """Change of accuracy against dense: what the slides say, and what was measured here, a line a method.

    A measured row stands in the line of a published one where network, data set and method are the same.
    """
    ours = [row for row in comparison.methods if row.entry.is_retrained == retrained]
    published = [one for one in DROPS.results if one.setting == RETRAINED[retrained]]
    lines, beside = [], set()
    for one in published:
        rows = [row for row in ours if _is_that(row, one)]
        beside |= {id(row) for row in rows}
        lines += [[one.network, one.method, *_published(one), *_measured(comparison, row)] for row in rows or [None]]
    here = [
        [_where(row), _called(row), "", "", "", *_measured(comparison, row)] for row in ours if id(row) not in beside
    ]
    headings = ["network", "method", "FR", "top-1", "top-5", "FR, here", "top-1, here", "top-5, here"]
    headings += [f"{comparison.currency.name}, here"]
    return Table(TITLES[retrained], headings, here + lines, texts=2)


def markdown(table: Table) -> str:
    marks = ["---"] * table.texts + ["---:"] * (len(table.headings) - table.texts)
    lines = [table.headings, marks, *table.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def _is_that(row: Row, one: Result) -> bool:
    is_data = DROPS.data.is_that_of(row.one.data, row.one.first["train_images"])
    return is_data and row.one.network == one.network and row.entry.published == one.method


def _published(one: Result) -> list[str]:
    return [f"{one.reduction:.2f}", *("" if x is None else f"{x:+.2f}" for x in (one.change1, one.change5))]


def _measured(comparison: Comparison, row: Row | None) -> list[str]:
    if row is None:
        return ["", "", "", ""]
    dense, hours = comparison.dense(row), row.by_seed(comparison.currency.hours)
    return [
        _words(row.by_seed(reduction), 2),
        _words(changes(row, dense, top1), 2, "+"),
        _words(changes(row, dense, top5), 2, "+"),
        _words(hours, 4 if max(hours.values()) < 1 else 2),
    ]


def _where(row: Row) -> str:
    return f"{row.one.network} on {row.one.data or 'a data set'}, {row.one.first['train_images']:,} images"


def _called(row: Row) -> str:
    return row.name if row.entry.published is None else f"{row.name} ({row.entry.published})"


def _words(values: Mapping[int, float], digits: int, sign: str = "") -> str:
    return in_words(Spread(*spread_of(values)), digits, sign) if values else ""


def _counted(row: Row) -> str:
    return "1 seed" if len(row.points) == 1 else f"{len(row.points)} seeds"
