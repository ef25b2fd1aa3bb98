"""MetaPruning's second stage: find widths with a trained PruningNet, for training from scratch.

python launch/search.py runs/pruning_net --target-reduction 2 --out widths.json   (torchrun shares the work)
"""

import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.log.attempt import job_began

# torchrun's start, Python's own and the import of torch are part of the cost.
STARTED = time.perf_counter() - (time.time() - job_began())

from train.cli import Parser, end_with, exit_code_of, non_negative_int, positive_int  # noqa: E402
from train.errors import ConfigError, TrainError  # noqa: E402
from train.log.ledger import Ledger  # noqa: E402
from train.log.rundir import RunDir  # noqa: E402
from train.peers import Peers  # noqa: E402
from train.search import SearchOptions, search_widths  # noqa: E402
from train.world import open_world  # noqa: E402

AFTER_INTERRUPT = "the same command goes on from the last network that was judged"


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _search(argv), "--debug" in argv, AFTER_INTERRUPT)


def _search(argv: list[str]) -> None:
    options = _parse(argv)
    names = ("target_reduction", "window", "population", "generations", "parents", "mutation")
    settings = SearchOptions(
        **{name: getattr(options, name) for name in names},
        recalibration_batches=options.recalibrate,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    world = open_world(options.device)
    checkpoint = Path(world.on_rank_zero(lambda: str(_checkpoint(options.source))))
    ledger = Ledger(world.size, started=STARTED)
    say = partial(print, flush=True)
    with Peers(world):
        found = search_widths(checkpoint, options.out, settings, world, ledger, options.data, say)
    if world.is_main:
        print(
            f"written: {options.out}, FR {found.flops_reduction:.3f}, top-1 {found.top1:.2f}% with generated weights, "
            f"the best of {found.judged} networks in {found.gpu_hours:.3f} h of all ranks"
        )
        print(f"to train it from scratch: launch/train.py --prune.method none --model.widths {options.out}")
    world.close()


def _parse(argv: list[str]) -> Namespace:
    defaults = SearchOptions(target_reduction=2.0)
    parser = Parser(prog="launch/search.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a finished run with prune.method meta_pruning, or its checkpoint")
    parser.add_argument(
        "--target-reduction", type=float, required=True, metavar="FR", help="FLOPs down by this factor at least"
    )
    parser.add_argument("--out", type=Path, default=Path("widths.json"), metavar="FILE", help="default: widths.json")
    parser.add_argument("--window", type=float, default=defaults.window, help="FR up to FR (1 + WINDOW) is allowed")
    parser.add_argument("--population", type=positive_int, default=defaults.population, help="networks a generation")
    parser.add_argument("--generations", type=positive_int, default=defaults.generations)
    parser.add_argument("--parents", type=positive_int, default=defaults.parents, help="best ones that have offspring")
    parser.add_argument("--mutation", type=float, default=defaults.mutation, help="probability for each layer's width")
    parser.add_argument(
        "--recalibrate",
        type=positive_int,
        default=defaults.recalibration_batches,
        metavar="BATCHES",
        help="training batches for batch-norm statistics",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="images a step of a rank; default: the run's"
    )
    parser.add_argument("--seed", type=non_negative_int, default=defaults.seed)
    parser.add_argument("--data", metavar="FOLDER", help="data set in place of the run's own")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _checkpoint(source: Path) -> Path:
    """The checkpoint to read: a finished run's last one. Raises ConfigError where there is none."""
    if not source.is_dir():
        return source
    run_dir = RunDir(source)
    if not run_dir.last.exists():
        raise ConfigError(f"{source} holds no {run_dir.last.name}: give a run's directory, or a checkpoint")
    if run_dir.closing_event() is None:
        raise TrainError(f"{source} has not come to its end: finish it, or give {run_dir.last} to search as it stands")
    return run_dir.last


if __name__ == "__main__":
    end_with(main)
