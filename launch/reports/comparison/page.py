"""The report of a comparison: one HTML file that needs no other, the same in Markdown, and a line a run as CSV."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from launch.reports.comparison import tables
from launch.reports.comparison.figure import draw_front
from launch.reports.comparison.results import Comparison, Point, reduction, top1, top5
from launch.reports.comparison.sentences import how_to_read, sentences
from launch.reports.figures import Figure
from launch.reports.page import Line, Table, data_uri, render
from train.errors import TrainError
from train.files import why_unwritten


@dataclass(frozen=True)
class Written:
    """The files of a report, and its Markdown for the terminal."""

    page: Path
    text: str


def write_report(comparison: Comparison, out: Path) -> Written:
    """Write report.html, report.md, runs.csv and the figure into `out`. Raises TrainError where that fails."""
    page = out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        figure = draw_front(comparison, out / "front.png")
        text = _markdown(comparison, figure)
        page.write_text(_html(comparison, figure), encoding="utf-8")
        (out / "report.md").write_text(text, encoding="utf-8")
        (out / "runs.csv").write_text(_runs_csv(comparison), encoding="utf-8")
    except OSError as error:
        raise TrainError(f"cannot write the report: {why_unwritten(error, page)}") from error
    return Written(page, text)


def _html(comparison: Comparison, figure: Figure) -> str:
    slides = [_drawn(tables.slides_table(comparison, retrained)) for retrained in (True, False)]
    return render(
        "comparison.html",
        title=f"{comparison.grid.path.stem}: methods and controls",
        subtitle=_subtitle(comparison),
        remarks=_remarks(comparison),
        everything=_drawn(tables.all_rows(comparison)),
        currency=comparison.currency.name,
        currency_note=comparison.currency.note,
        figure={"title": figure.title, "caption": figure.caption, "source": data_uri(figure.path)},
        how_to_read=how_to_read(comparison),
        sentences=sentences(comparison),
        slides=slides,
    )


def _drawn(table: tables.Table) -> Table:
    """For the template. A line that holds nothing measured here looks like a published one."""
    here = [number for number, heading in enumerate(table.headings) if heading.endswith(", here")]
    lines = [Line(cells, published=bool(here) and not any(cells[n] for n in here)) for cells in table.rows]
    return Table(table.headings, lines, texts=table.texts, title=table.title)


def _markdown(comparison: Comparison, figure: Figure) -> str:
    parts = [f"# {comparison.grid.path.stem}: methods and controls", _subtitle(comparison), *_remarks(comparison)]
    parts += [tables.markdown(tables.all_rows(comparison))]
    parts += [f"{comparison.currency.name}: {comparison.currency.note}.", f"![{figure.title}]({figure.path.name})"]
    parts += ["## Each method against each control", how_to_read(comparison)]
    for method, lines in sentences(comparison):
        parts += [f"**{method}**", "\n".join(f"- {line}" for line in lines)]
    for retrained in (True, False):
        table = tables.slides_table(comparison, retrained)
        parts += [f"## {table.title}: change of accuracy against dense, points", tables.markdown(table)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _subtitle(comparison: Comparison) -> str:
    points = [point for row in comparison.rows for point in row.points]
    run, seeds = points[0].run, sorted({point.job.seed for point in points})
    return (
        f"{len(points)} runs, seeds {', '.join(map(str, seeds))}; {run.network} on {run.data or 'a data set'}, "
        f"{run.first['train_images']:,} images for training, {run.first.get('val_images', 0):,} for validation"
        f"{run.validated_at}; "
        f"{run.first['epochs']} epochs"
    )


def _remarks(comparison: Comparison) -> list[str]:
    """What a reader must know: what is missing, and runs on machines that are not alike."""
    remarks = []
    if comparison.missing:
        names = ", ".join(comparison.missing[:5]) + (", ..." if len(comparison.missing) > 5 else "")
        remarks.append(f"Not finished, so not in here: {len(comparison.missing)} runs ({names}).")
    where = {_machine(point) for row in comparison.rows for point in row.points}
    if len(where) > 1:
        remarks.append(f"Runs were made in different places, so that hours compare badly: {'; '.join(sorted(where))}.")
    return remarks


def _machine(point: Point) -> str:
    starts = point.run.starts
    return " then ".join(
        dict.fromkeys(f"{one['world_size']} x {', '.join(sorted(set(one['devices'])))}" for one in starts)
    )


def _runs_csv(comparison: Comparison) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "entry", "setting", "seed", "flops_reduction", "top1_percent", "top5_percent", "gpu_hours", "cpu_hours"]
    )
    for row in comparison.rows:
        for point in row.points:
            measured = [reduction(point), top1(point), top5(point), point.cost.wall, point.cost.cpu]
            writer.writerow([point.job.name, row.entry.name, row.setting, point.job.seed, *measured])
    return text.getvalue()
