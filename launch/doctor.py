"""A machine's check-up before training: versions, decoding, rates, cuts, resume, ranks that die.

python launch/doctor.py [--quick] [--device cpu] [--out results/FILE.json]
torchrun --standalone --nproc-per-node=8 launch/doctor.py
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.allocation import prefer_growing_segments

prefer_growing_segments()  # as in training
# Read once, before the first matrix product on a GPU; a resume can be bit-equal only with it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from launch.benches.measure import machine as described  # noqa: E402
from launch.benches.measure import write_result  # noqa: E402
from launch.checkup.check import EFFORTS, Check, Machine, Result, perform  # noqa: E402
from launch.checkup.images import make_photographs  # noqa: E402
from launch.checkup.table import CHECKS  # noqa: E402
from train import cli  # noqa: E402
from train.cli import Parser, end_with, exit_code_of  # noqa: E402
from train.errors import ConfigError, TrainError  # noqa: E402
from train.files import why_unwritten  # noqa: E402
from train.world import World, open_world  # noqa: E402


class CheckupError(TrainError):
    """Some check has failed."""


def main(argv: list[str]) -> int:
    """Exit code: 0 where no check failed, 1 where one did, 2 for a wrong argument."""
    return exit_code_of(lambda: _check_up(argv), "--debug" in argv)


def _check_up(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    world = open_world(options.device)
    checks = _chosen(options)
    folder = Path(world.on_rank_zero(lambda: _make_folder(options.root)))
    try:
        machine = Machine(world, EFFORTS[world.device.type, "quick" if options.quick else "full"], folder)
        world.on_rank_zero(lambda: make_photographs(machine))
        results = []
        for result in perform(checks, machine, lambda number, check: _say_begun(world, number, len(checks), check)):
            results.append(result)
            _say_result(world, result)
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if options.out:
        world.on_rank_zero(lambda: write_result(options.out, _content(options, world, results)))
    _say_sum(world, results)
    _require_passed(world, results)
    world.close()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="launch/doctor.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute in place of ten")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="the checks whose names have one of these in them")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, with the machine's name")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="where all ranks see a folder that is made for the check-up, and removed (default: runs)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _chosen(options: argparse.Namespace) -> list[Check]:
    """Raises ConfigError where --only names none."""
    checks = [check for check in CHECKS if check.is_quick or not options.quick]
    if options.only:
        checks = [check for check in checks if any(word.lower() in check.name.lower() for word in options.only)]
    if not checks:
        names = ", ".join(check.name for check in CHECKS)
        raise ConfigError(f"--only: found {' '.join(options.only)}, allowed: parts of the names of checks, {names}")
    return checks


def _make_folder(root: Path) -> str:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="doctor-", dir=root.resolve())
    except OSError as error:
        raise TrainError(f"cannot write in {root}: {why_unwritten(error, root)}; give another --root") from error


def _say_begun(world: World, number: int, count: int, check: Check) -> None:
    """The first half of a line, so that it is seen what is under way."""
    if world.is_main:
        print(f"{number:>2}/{count} {check.name:<30}", end=" ", flush=True)


def _say_result(world: World, result: Result) -> None:
    if world.is_main:
        print(f"{result.status:<7} {result.seconds:5.1f} s  {result.text}", flush=True)


def _say_sum(world: World, results: list[Result]) -> None:
    if world.is_main:
        counts = {status: sum(result.status == status for result in results) for status in ("pass", "fail", "skipped")}
        print(
            f"{counts['pass']} passed, {counts['fail']} failed, {counts['skipped']} skipped, "
            f"{sum(result.seconds for result in results):.0f} s",
            flush=True,
        )


def _require_passed(world: World, results: list[Result]) -> None:
    """Where a check failed, raises CheckupError on rank 0; the other ranks end with its exit code and say nothing."""
    failed = [result.name for result in results if result.status == "fail"]
    if not failed:
        return
    if not world.is_main:
        time.sleep(cli.EXIT_DELAY_S)  # torchrun ends rank 0, which has the error to say, once another is gone
        raise SystemExit(1)
    raise CheckupError(f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}")


def _content(options: argparse.Namespace, world: World, results: list[Result]) -> dict[str, object]:
    return {
        "doctor": "quick" if options.quick else "full",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "ranks": world.size,
        "device": world.device.type,
        "machine": described("torchvision", "nvidia-dali-cuda130", "Pillow"),
        "checks": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    end_with(main)
