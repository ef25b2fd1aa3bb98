"""Run directories -> the savings table (Markdown and CSV) and a figure of how each run went.

python launch/report.py runs/demo_dense runs/demo --out runs/report

Reads nothing but each run's log.jsonl. A saving is measured against the dense run with the same network and settings.
"""

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from train.cli import Parser, exit_code_of
from train.errors import TrainError
from train.rundir import RunDir, read_log


@dataclass(frozen=True)
class Row:
    """One line of the savings table.

    hours: GPU hours (ranks x wall time on a CPU run), those of the training that a run started from included.
    """

    name: str
    reduction: float
    top1: float
    top5: float | None
    hours: float | None
    saving: float | None
    """Percent of the dense run's hours that this run did not need."""
    device: str


# ResNet-50 on ImageNet, 3 Titan Xp; the authors' tables (arXiv 1911.08630, slides).
PUBLISHED = (
    Row("paper: ResNet-50 dense", 1.0, 75.86, 92.87, 66.0, None, "cuda"),
    Row("paper: ResNet-50 CUP-SS (k 0.03, b 0.3)", 2.20, 74.40, 91.99, 54.48, 17.5, "cuda"),
    Row("paper: ResNet-50 CUP-RF (slides)", 2.21, 74.34, None, 51.6, 21.8, "cuda"),
    Row("paper: ResNet-50 SFP (slides)", 1.73, 74.01, None, 61.8, 6.4, "cuda"),
    Row("paper: ResNet-50 GM (slides)", 2.15, 74.13, None, 62.2, 5.8, "cuda"),
)


@dataclass(frozen=True)
class Run:
    """What a log says of one run. `first` is its run event, `done` its closing one."""

    name: str
    first: dict[str, Any]
    epochs: list[dict[str, Any]]
    done: dict[str, Any]


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _report(argv), "--debug" in argv)


def read_run(directory: Path) -> Run:
    """Raises TrainError if the directory holds no finished run."""
    log = RunDir(directory).log
    if not log.exists():
        raise TrainError(f"{directory} is no run directory: it has no {log.name}")
    events = read_log(log)
    by_kind = {kind: [e for e in events if e["event"] == kind] for kind in ("run", "epoch", "done")}
    if not by_kind["done"]:
        raise TrainError(f"the run in {directory} is not finished: start it again with the same command, it will go on")
    first = {"from": None, "gpu_hours_before": 0.0} | by_kind["run"][0]  # older logs know of no such start
    return Run(directory.name, first, by_kind["epoch"], by_kind["done"][-1])


# A saving is a difference of hours, so everything else that decides hours must be the same.
COMPARABLE = ("model", "epochs", "batch_size", "train_images", "precision", "loader", "world_size", "devices")


def savings(runs: list[Run]) -> list[Row]:
    """One row a run. The saving is against the mean of the dense runs that are comparable, where there are any."""
    rows = []
    for run in runs:
        dense = [r.done["gpu_hours"] for r in runs if _kind(r) == "dense" and _setting(r) == _setting(run)]
        done, before, kind = run.done, run.first["gpu_hours_before"], _kind(run)
        hours = done["gpu_hours"] + (before or 0.0)
        known = dense and kind != "dense" and before is not None
        saving = 100 * (1 - hours / (sum(dense) / len(dense))) if known else None
        name = f"{run.name}: {run.first['model']}, {kind}"
        rows.append(Row(name, done["flops_reduction"], done["top1"], done["top5"], hours, saving, done["device"]))
    return rows


def _kind(run: Run) -> str:
    kind = "CUP-SS" if run.first["cup"] else "dense"
    if run.first["from"] is None:
        return kind
    return "retrained" if kind == "dense" else f"{kind} on a cut network"


def hours_note(run: Run) -> str:
    """What the hours of a run that started from a checkpoint are made of; "" for any other."""
    if run.first["from"] is None:
        return ""
    own, before = run.done["gpu_hours"], run.first["gpu_hours_before"]
    if before is None:
        return f"{run.name}: GPU hours of its own alone; nobody knows those of the weights in {run.first['from']}"
    return f"{run.name}: {before:.4f} GPU hours went into {run.first['from']}, {own:.4f} into retraining it"


def _setting(run: Run) -> list[Any]:
    return [run.first[key] for key in COMPARABLE]


def markdown(rows: list[Row]) -> str:
    """The table for people. Hours of a CPU run are marked as such."""
    lines = [
        "| run | FR | top-1 (%) | top-5 (%) | GPU hours | saving (%) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        hours = _number(row.hours, 4 if row.hours is not None and row.hours < 1 else 2)
        hours += " (CPU)" if row.device == "cpu" else ""
        cells = [row.name, _number(row.reduction, 2), _number(row.top1, 2), _number(row.top5, 2), hours]
        lines.append(f"| {' | '.join([*cells, _number(row.saving, 1)])} |")
    return "\n".join(lines) + "\n"


def comma_separated(rows: list[Row]) -> str:
    """The table for programs, in full precision; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "flops_reduction", "top1_percent", "top5_percent", "gpu_hours", "saving_percent", "device"])
    for row in rows:
        writer.writerow([row.name, row.reduction, row.top1, row.top5, row.hours, row.saving, row.device])
    return text.getvalue()


def figure(runs: list[Run], path: Path) -> None:
    """Four panels over the epochs: FLOPs reduction, threshold, top-1 and seconds an epoch; one line a run."""
    fig, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, layout="constrained")
    panels = (
        (axes[0, 0], "FLOPs reduction (x)", lambda line: line["flops_reduction"]),
        (axes[0, 1], "top-1 accuracy (%)", lambda line: line["top1"]),
        (axes[1, 0], "threshold t of the cut", lambda line: line["threshold"]),
        (axes[1, 1], "training time (s per epoch)", _training_seconds),
    )
    for axis, label, value in panels:
        for number, run in enumerate(runs):
            _curve(axis, run, value, color=f"C{number}")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[1, 1].set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=max(1, min(4, len(runs))), frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _report(argv: list[str]) -> None:
    parser = Parser(prog="launch/report.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, e.g. runs/demo")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), metavar="DIR", help="default: runs/report")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    runs = [read_run(directory) for directory in options.runs]
    ours = savings(runs)
    rows = [*ours, *PUBLISHED]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "savings.md").write_text(markdown(rows), encoding="utf-8")
        (options.out / "savings.csv").write_text(comma_separated(rows), encoding="utf-8")
        figure(runs, options.out / "epochs.png")
    except OSError as error:
        raise TrainError(f"cannot write the report to {options.out}: {error.strerror}") from error
    print(markdown(rows), end="")
    for run, row in zip(runs, ours, strict=True):
        if note := hours_note(run):
            print(note)
        if _kind(run) != "dense" and row.saving is None and run.first["gpu_hours_before"] is not None:
            print(f"{run.name}: no saving, for no dense run among these has equal {', '.join(COMPARABLE)}")
    print(f"written: {', '.join(str(options.out / name) for name in ('savings.md', 'savings.csv', 'epochs.png'))}")


def _curve(axis: Axes, run: Run, value: Any, color: str) -> None:
    points = [(line["epoch"], value(line)) for line in run.epochs if value(line) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=run.name, color=color)


def _training_seconds(line: dict[str, Any]) -> float:
    """What a smaller network can shorten, and what shrinking it costs."""
    return sum(line["seconds"][kind] for kind in ("data_wait", "step", "resize", "resize_warmup"))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
