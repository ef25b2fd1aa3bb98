"""Run a comparison of methods and controls from one file, and report on it.

python launch/compare.py launch/configs/compare/resnet20_cifar10.yaml --set data.path=datasets/cifar10 --dry-run
python launch/compare.py launch/configs/compare/resnet20_cifar10.yaml --set data.path=datasets/cifar10 --jobs 2

What is there already is not run again, an unfinished run goes on: the same command, as often as it takes. Ctrl-C saves
the runs and stops.
"""

import sys
from argparse import Namespace
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.grids.board import open_board
from launch.grids.disk import Disk, hold
from launch.grids.estimate import plan_in_words
from launch.grids.grid import Grid, overridden, read_grid
from launch.grids.jobs import Job, plan_jobs
from launch.grids.runner import Runner, State
from train.cli import Parser, exit_code_of, positive_int
from train.errors import TrainError
from train.signals import StopSignals


def main(argv: list[str]) -> int:
    """Exit code: 0 if every run is finished, 2 for a wrong argument or grid, 1 for anything else."""
    return exit_code_of(lambda: _compare(argv), "--debug" in argv, "the same command goes on")


def _compare(argv: list[str]) -> None:
    options = _parse(argv)
    grid = read_grid(options.grid, options.set, options.out)
    for key in overridden(grid, options.set):
        print(f"note: --set {key} has no effect: every run of {options.grid} sets it itself", file=sys.stderr)
    jobs = plan_jobs(grid)
    disk = Disk(grid.out)
    runner = Runner(jobs, disk, options.jobs, options.ranks)
    runner.look()
    if options.dry_run:
        print(plan_in_words(jobs, runner.statuses, disk, options.jobs, options.ranks))
        return
    if not options.report_only:
        with hold(disk.lock):
            _run(runner, options)
    finished = [name for name, status in runner.statuses.items() if status.state is State.DONE]
    _report(grid, jobs, disk, finished)
    if len(finished) < len(jobs) and not options.report_only:
        raise TrainError(f"{len(jobs) - len(finished)} of {len(jobs)} runs are not finished")


def _report(grid: Grid, jobs: dict[str, Job], disk: Disk, finished: list[str]) -> None:
    from launch.reports.comparison.page import write_report  # matplotlib takes a second
    from launch.reports.comparison.results import read_comparison

    written = write_report(read_comparison(grid, jobs, disk, finished), grid.out)
    print(f"\n{written.text}\nwritten: {written.page}, and report.md, runs.csv and front.png beside it")


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(prog="launch/compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path, metavar="GRID.yaml", help="the file; launch/configs/compare/ holds some")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the file's `set`")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time; default: 1")
    parser.add_argument("--ranks", type=positive_int, default=1, metavar="N", help="processes of a run; default: 1")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of runs and report; default: as the file says")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it costs, run nothing")
    parser.add_argument("--report-only", action="store_true", help="report on what is finished, run nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _run(runner: Runner, options: Namespace) -> None:
    signals = StopSignals()
    board = open_board(runner.jobs, runner.disk, options.jobs)
    with signals:
        try:
            runner.run(board.show, lambda: signals.stop_wanted)
        finally:
            board.close()
    if signals.stop_wanted:
        raise TrainError("stopped; the runs are saved, and the same command goes on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
