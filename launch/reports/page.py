"""The report as one HTML file that needs no other: figures inside, no script, nothing fetched."""

import base64
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from launch.reports import published
from launch.reports.figures import Figure
from launch.reports.read import Group, Run, differing_settings
from launch.reports.tables import (
    ALL_COLUMNS,
    COLUMNS,
    Row,
    cells_of,
    columns_of,
    kinds_of,
    method_of,
    our_rows,
    outcomes,
    published_rows,
    published_tables,
    row_of,
    tables_of,
    telling,
)

LOSSES = ("loss_before", "loss_after")
"""Of a resize event; older logs lack them."""


@dataclass(frozen=True)
class Line:
    """A line of a table; published ones look different from ours."""

    cells: list[str]
    published: bool = False


@dataclass(frozen=True)
class Table:
    """What the template draws; the first `texts` columns are text, the others numbers."""

    headings: list[str]
    rows: list[Line]
    texts: int = 1
    caption: str = ""
    title: str = ""


def page(groups: list[Group], figures: list[Figure], remarks: list[str]) -> str:
    """The whole page. The figures' files are read and put inside."""
    rows = our_rows(groups)
    networks = list(dict.fromkeys(group.one.network for group in groups))
    runs = [run for group in groups for run in group.runs]
    beside = published_rows(runs)
    return render(
        "page.html",
        title=f"{' and '.join(networks)}: what was trained and what it cost",
        subtitle=_subtitle(runs),
        headlines=[_headline(row) for row in rows if row.saving or row.change1],
        results=_results(rows),
        remarks=remarks,
        beside=_with_published([*rows, *beside]) if beside else None,
        beside_note=_sources(runs),
        figures=[
            {"title": figure.title, "caption": figure.caption, "source": data_uri(figure.path)} for figure in figures
        ],
        every_run=_every_run(groups),
        ledger=_ledger(groups),
        by_rank=_by_rank(runs),
        machine=_machine(runs),
        resizes=[_resizes(run) for run in runs if run.resizes],
        differing=_differing(groups),
        no_difference=_no_difference(groups),
        settings=[(run.name, _yaml(run)) for run in runs],
        hardware=_hardware(runs),
        published=[_with_published(table_rows, title) for title, table_rows in published_tables()],
        published_notes=published.NOTES,
    )


def render(template: str, **values: Any) -> str:
    """The template, a file of this folder, with these values in it, escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _subtitle(runs: list[Run]) -> str:
    data = ", ".join(
        dict.fromkeys(
            f"{run.data or 'a data set'} of {run.first['train_images']:,} images{run.validated_at}" for run in runs
        )
    )
    where = ", ".join(dict.fromkeys(_devices(run) for run in runs))
    return f"{_counted(len(runs), 'run')} on {data}; {where}"


def _headline(row: Row) -> dict[str, Any]:
    numbers = [
        (f"{_hours(row)} saved", row.saving, lambda value: f"{value:.1f}%", 1),
        ("FLOPs reduction", row.reduction, lambda value: f"{value:.2f}x", 2),
        ("top-1 against dense", row.change1, lambda value: f"{value:+.2f} points", 2),
    ]
    if not row.saving_is_told_apart:
        numbers = numbers[1:]
    return {
        "name": row.name,
        "method": row.method + _repetitions(row),
        "sentence": None if row.saving_is_told_apart else _not_told_apart(row),
        "numbers": [
            (label, words(value.mean), None if value.deviation is None else f"{value.deviation:.{digits}f}")
            for label, value, words, digits in numbers
            if value is not None
        ],
    }


def _hours(row: Row) -> str:
    return "GPU hours (CPU)" if row.on_cpu else "GPU hours"


def _repetitions(row: Row) -> str:
    return "" if row.count == 1 else ", " + row.runs.replace(str(row.count), f"{row.count} runs", 1)


def _not_told_apart(row: Row) -> str:
    return (
        f"{_hours(row)}: {row.saving.mean:+.1f}% of saving, and the dense run's own epochs vary by "
        f"{row.scatter.mean:.1f}%: this machine does not tell them apart."
    )


def _results(rows: list[Row]) -> Table:
    keys, columns = telling(rows), columns_of(rows)
    cells = [
        [row.name, *(getattr(row, key) for key in keys), method_of(row), row.runs, *cells_of(row, columns).values()]
        for row in rows
    ]
    headings = ["run", *keys, "method", "runs", *(heading for heading, _, _ in columns)]
    return Table(headings, [Line(line) for line in cells], texts=2 + len(keys))


def _with_published(rows: list[Row], title: str = "") -> Table:
    """Every measured column in which a row has something."""
    columns = [column for column in ALL_COLUMNS if any(getattr(row, column[1]) is not None for row in rows)]
    keys = telling(rows, "network")
    lines = []
    for row in rows:
        cells = [row.name, *(getattr(row, key) for key in keys), method_of(row), *cells_of(row, columns).values()]
        lines.append(Line(cells, published=bool(row.source)))
    headings = ["run", *keys, "method", *(heading for heading, _, _ in columns)]
    return Table(headings, lines, texts=2 + len(keys), title=title)


def _sources(runs: list[Run]) -> str:
    """Where and on what the published rows beside these runs were measured."""
    titles = [table.title for table in tables_of(runs)]
    return f"Published: {'; '.join(titles)}. Hours of other hardware compare with each other, not with ours."


def _every_run(groups: list[Group]) -> Table:
    lines = []
    for outcome in (outcome for _, measured in outcomes(groups) for outcome in measured):
        run, best = outcome.run, outcome.run.done.get("best_top1")
        cells = cells_of(row_of(Group(run.name, (run,)), [outcome])).values()
        seed = "" if run.seed is None else str(run.seed)
        lines.append(Line([run.name, run.method, seed, *cells, "" if best is None else f"{best:.2f}"]))
    headings = ["run", "method", "seed", *(heading for heading, _, _ in COLUMNS), "best top-1 (%)"]
    return Table(headings, lines, texts=2)


def _ledger(groups: list[Group]) -> Table:
    kinds = kinds_of(groups)
    lines = []
    for run in (run for group in groups for run in group.runs):
        seconds = run.done.get("seconds", {})
        wall, total = run.done.get("time_s"), sum(seconds.values())
        spent = [f"{seconds.get(kind, 0.0):,.1f}" for kind in kinds]
        lines.append(Line([run.name, *spent, f"{total:,.1f}", "" if wall is None else f"{wall:,.1f}"]))
    headings = ["run", *(kind.replace("_", " ") for kind in kinds), "sum", "wall"]
    return Table(
        headings, lines, caption="Seconds by kind, of rank 0; each is charged to one kind, and wall is the clock's."
    )


def _by_rank(runs: list[Run]) -> Table | None:
    """Where the log has each rank's own seconds, and there are several."""
    kinds: dict[str, None] = {}
    totals: list[tuple[str, int, dict[str, float]]] = []
    for run in runs:
        reports = [line["seconds_by_rank"] for line in run.epochs if line.get("seconds_by_rank")]
        ranks = max((len(report) for report in reports), default=0)
        for rank in range(ranks if ranks > 1 else 0):
            own = [report[rank] for report in reports if rank < len(report)]
            kinds |= dict.fromkeys(kind for one in own for kind in one)
            totals.append((run.name, rank, {kind: sum(one.get(kind, 0.0) for one in own) for kind in kinds}))
    shown = [kind for kind in kinds if any(total.get(kind) for _, _, total in totals)]
    lines = [
        Line([name, str(rank), *(f"{total.get(kind, 0.0):,.1f}" for kind in shown)]) for name, rank, total in totals
    ]
    headings = ["run", "rank", *(kind.replace("_", " ") for kind in shown)]
    return Table(headings, lines, caption="Up to the last evaluation.") if lines else None


def _machine(runs: list[Run]) -> Table | None:
    """Memory, and the shares of data wait and all-reduce in training, where the log has any of them."""
    lines = []
    for run in runs:
        memory = [line["peak_memory"] for line in run.epochs if line.get("peak_memory")]
        held = [line["device_memory"] for line in run.epochs if line.get("device_memory")]
        reduce = [line["all_reduce_s"] for line in run.epochs if line.get("all_reduce_s") is not None]
        if memory or reduce:
            spent = {kind: sum(line["seconds"].get(kind, 0.0) for line in run.epochs) for kind in ("step", "data_wait")}
            training = sum(spent.values())
            lines.append(
                Line(
                    [
                        run.name,
                        f"{memory[0] / 2**30:,.2f}" if memory else "",
                        f"{memory[-1] / 2**30:,.2f}" if memory else "",
                        f"{max(memory) / 2**30:,.2f}" if memory else "",
                        f"{max(held) / 2**30:,.2f}" if held else "",
                        _percent(spent["data_wait"], training),
                        _percent(sum(reduce), training) if reduce else "",
                    ]
                )
            )
    headings = ["run", *(f"peak memory, {when} (GiB)" for when in ("first epoch", "last epoch", "all"))]
    headings += ["GPU memory in use (GiB)", "data wait (% of training)", "all-reduce (% of training)"]
    shown = [number for number in range(len(headings)) if any(line.cells[number] for line in lines)]
    caption = (
        "Memory of the rank that needs most. Peak: of tensors on a GPU in that epoch, on a CPU of the process so far. "
        "In use: most of the GPU at an epoch's end, with what the allocator keeps, DALI, NCCL and other processes hold."
    )
    lines = [Line([line.cells[number] for number in shown]) for line in lines]
    return Table([headings[number] for number in shown], lines, caption=caption) if lines else None


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else ""


def _resizes(run: Run) -> Table:
    speed = {line["epoch"]: line["images_per_s"] for line in run.epochs if "images_per_s" in line}
    lines = []
    for event in run.resizes:
        # The first epoch that trains at the new widths; older logs know cuts at the starts of epochs alone.
        epoch, t = event["epoch"] + (event.get("when") == "end"), event["threshold"]
        around = [speed.get(epoch - 1), speed.get(epoch)]
        lines.append(
            Line(
                [
                    str(epoch),
                    "" if t is None else f"{t:.3f}",
                    f"{sum(event['removed'].values()):,}",
                    f"{event['flops_reduction_before']:.2f} → {event['flops_reduction_after']:.2f}",
                    f"{event['seconds']:.2f}",
                    " → ".join("?" if one is None else f"{one:,.0f}" for one in around),
                    " → ".join("?" if (one := event.get(key)) is None else f"{one:.3f}" for key in LOSSES),
                ]
            )
        )
    headings = ["before epoch", "t", "channels removed", "FR", "seconds", "images/s, epoch before → after", "loss"]
    return Table(headings, lines, title=f"{run.name}: {_counted(len(run.resizes), 'resize')}", texts=0)


def _differing(groups: list[Group]) -> Table | None:
    differences = differing_settings(groups)
    lines = [Line([key, *map(_value, values)]) for key, values in differences.items()]
    return Table(["setting", *(group.name for group in groups)], lines, texts=1 + len(groups)) if lines else None


def _no_difference(groups: list[Group]) -> str:
    if any(not group.one.settings for group in groups):
        return "The logs are of an older version and do not hold the settings."
    if sum(len(group.runs) for group in groups) == 1:
        return "There is one run."
    return "All runs have the same settings, but for names and seeds."


def _hardware(runs: list[Run]) -> Table:
    """Equal machines once."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.first.get("versions", {}).items())
        machine = (_devices(run), run.first["precision"], run.first["loader"], versions)
        lines.setdefault(machine, []).append(run.name)
    headings = ["devices", "precision", "loader", "versions", "runs"]
    return Table(headings, [Line([*machine, ", ".join(names)]) for machine, names in lines.items()], texts=5)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _devices(run: Run) -> str:
    """Of every process that the run had."""
    found = [Counter(start["devices"]) for start in run.starts]
    words = [" and ".join(f"{count} x {device}" for device, count in counts.items()) for counts in found]
    return ", then ".join(dict.fromkeys(words))


def _yaml(run: Run) -> str:
    config = run.first.get("config")
    return yaml.safe_dump(config, sort_keys=False) if config else "not in this run's log (an older version's)"


def _value(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
