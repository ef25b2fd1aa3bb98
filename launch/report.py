"""Run directories -> one page with tables and figures (HTML), the savings table (Markdown, CSV) and the figures (PNG).

python launch/report.py runs/demo_dense runs/demo --out runs/report
python launch/report.py runs/demo_dense runs/demo --dendrogram layer1.0.conv1 layer3.2.conv1

Runs that differ in nothing but their seeds become one row: mean, standard deviation. A saving is measured against the
dense runs with the same network and settings, seed by seed where they have the same seeds. Nothing is read but each
run's log.jsonl, and for dendrograms its checkpoint.
"""

import sys
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.reports.figures import Figure, draw_figures
from launch.reports.page import page
from launch.reports.read import Group, group_runs, read_runs
from launch.reports.tables import markdown, means_csv, notes, our_rows, published_rows, runs_csv
from train.cli import Parser, exit_code_of
from train.errors import TrainError
from train.files import why_unwritten


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _report(argv), "--debug" in argv)


def _report(argv: list[str]) -> None:
    parser = Parser(prog="launch/report.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, e.g. runs/demo")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), metavar="DIR", help="default: runs/report")
    parser.add_argument(
        "--dendrogram", nargs="+", default=[], metavar="LAYER", help="draw the trees of these layers, as trained"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    directories: dict[Path, Path] = {}
    for directory in options.runs:  # by two paths a run would be its own repetition
        directories.setdefault(directory.resolve(), directory)
    runs, left_out = read_runs(directories.values())
    groups = group_runs(runs)
    rows = [*our_rows(groups), *published_rows(group.one for group in groups)]
    remarks = left_out + notes(groups)
    out = options.out
    try:
        trees, missing = _draw_layers(groups, options.dendrogram, out)  # first, for a layer's name can be wrong
        remarks += missing
        out.mkdir(parents=True, exist_ok=True)
        figures = draw_figures(groups, out)
        (out / "savings.md").write_text(markdown(rows), encoding="utf-8")
        (out / "savings.csv").write_text(means_csv(rows), encoding="utf-8")
        (out / "runs.csv").write_text(runs_csv(groups), encoding="utf-8")
        (out / "report.html").write_text(page(groups, figures + trees, remarks), encoding="utf-8")
    except OSError as error:
        raise TrainError(f"cannot write the report: {why_unwritten(error, out / 'report.html')}") from error
    print(markdown(rows), end="")
    for remark in remarks:
        print(remark)
    print(f"written: {out / 'report.html'}, and savings.md, savings.csv, runs.csv and the figures beside it")


def _draw_layers(groups: list[Group], layers: list[str], out: Path) -> tuple[list[Figure], list[str]]:
    if not layers:
        return [], []
    from launch.reports.dendrograms import draw_layers  # a network needs torch, whose import takes seconds

    return draw_layers(groups, layers, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
