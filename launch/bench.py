"""Measurements, each side by side with its peer in the same process.

python launch/bench.py loader --data FOLDER [--rounds N] [--out results/FILE.json]
python launch/bench.py memory --data FOLDER [--epochs N] [--out results/FILE.json]
python launch/bench.py agreement --data FOLDER [--checkpoint FILE] [--out results/FILE.json]
python launch/bench.py checkpoint [--folder FOLDER] [--out results/FILE.json]
python launch/bench.py resize [--rounds N] [--out results/FILE.json]      (--help after a measurement names its options)
python launch/bench.py step --model NAME [--run DIR | --widths FILE | --reduction FR] [--round-to 1 8 measured]
python launch/bench.py cost [--models NAME ...] [--widths N] [--out results/FILE.json]
python launch/bench.py targets --calibration results/cost.json [--speed-up S] [--out results/FILE.json]
python launch/bench.py devices [--model NAME] [--reduction FR]                 (modelled, nothing is timed)
python launch/bench.py rates [--devices NAME ...]                    (modelled against published, nothing is timed)
python launch/bench.py savings --run DIR --images 1281167 --epochs 90 [--round-to 1 8 measured]
"""

import sys
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.benches import (
    agreement,
    checkpoint,
    cost,
    devices,
    loader,
    memory,
    models,
    rates,
    resize,
    savings,
    step,
    targets,
)
from train.cli import Parser, end_with, exit_code_of

BENCHES = {
    "agreement": agreement,
    "checkpoint": checkpoint,
    "cost": cost,
    "devices": devices,
    "loader": loader,
    "memory": memory,
    "models": models,
    "rates": rates,
    "resize": resize,
    "savings": savings,
    "step": step,
    "targets": targets,
}


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _bench(argv), "--debug" in argv)


def _bench(argv: list[str]) -> None:
    parser = Parser(prog="launch/bench.py", description=__doc__.splitlines()[0])
    measurements = parser.add_subparsers(dest="measurement", required=True, metavar="MEASUREMENT")
    for name, bench in BENCHES.items():
        own = measurements.add_parser(name, help=bench.__doc__.splitlines()[0])
        own.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, with the machine's name")
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        bench.add_arguments(own)
    options = parser.parse_args(argv)
    BENCHES[options.measurement].measure(options)


if __name__ == "__main__":
    end_with(main)
