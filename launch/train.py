"""Train a classifier while it shrinks.

torchrun --standalone --nproc-per-node=2 launch/train.py [--recipe NAME | --config FILE] [--KEY VALUE ...]

--recipe list: what there is; without one the demo is trained.
"""

import os
import sys
import time
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from train.allocation import prefer_growing_segments  # noqa: E402
from train.log.attempt import Attempt, began  # noqa: E402

prefer_growing_segments()

# Python's own start and the import of torch are part of the run, and an attempt that is killed in them has spent them.
STARTED = time.perf_counter() - (time.time() - began())
ATTEMPT = Attempt(sys.argv[1:]) if __name__ == "__main__" and os.environ.get("RANK", "0") == "0" else None

from train.cli import command_again, end_with, exit_code_of  # noqa: E402
from train.config import parse_config  # noqa: E402
from train.log.ledger import Ledger  # noqa: E402
from train.recipes import DEFAULT, is_list_wanted, recipes, with_recipe_first  # noqa: E402
from train.run import run  # noqa: E402
from train.world import open_world  # noqa: E402

AFTER_INTERRUPT = "the same command goes on from the last checkpoint, if there is one"


def main(argv: list[str]) -> int:
    """Exit code: 0 after a finished run or a stopped and saved one, 2 for a configuration error, 1 for any other."""
    try:
        return exit_code_of(lambda: _train(argv), "--debug" in argv, AFTER_INTERRUPT)
    finally:
        _end_attempt()


def _end_attempt() -> None:
    if ATTEMPT is not None:
        ATTEMPT.end()


def _train(argv: list[str]) -> None:
    if is_list_wanted(argv):
        _list_recipes()
        return
    with_recipe = with_recipe_first(argv)
    config = parse_config(with_recipe, "launch/train.py", DEFAULT)
    world = open_world(config.run.device, config.run.timeout_minutes)
    if world.is_main:
        print(f"recipe {os.path.relpath(with_recipe[1])}", flush=True)
    ending = run(config, world, Ledger(world.size, started=STARTED), _end_attempt)
    world.close()
    if ending["event"] == "stopped" and world.is_main:
        where = f"in epoch {ending['epoch']}, after step {ending['step']}"
        again = command_again(argv, config.run.resume, config.run.name, ending["directory"])
        try:
            print(f"stopped {where}, and saved; to go on: {again}", flush=True)
        except OSError:  # nobody reads it any more, nor what Python would flush at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _list_recipes() -> None:
    for name, what in recipes().items() if os.environ.get("RANK", "0") == "0" else ():
        print(f"{name:24} {what}")


if __name__ == "__main__":
    end_with(main)
