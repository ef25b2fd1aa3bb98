"""Exact top-1 and top-5 of a checkpoint, at the widths it was stored with.

python launch/evaluate.py runs/demo/best.pt [--data FOLDER]      (torchrun shares the work among ranks)
"""

import sys
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import Parser, exit_code_of, positive_int
from train.evaluate import evaluate_checkpoint
from train.world import open_world


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _evaluate(argv), "--debug" in argv)


def _evaluate(argv: list[str]) -> None:
    parser = Parser(prog="launch/evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of a run (last.pt, best.pt) or of launch/prune.py")
    parser.add_argument("--data", metavar="FOLDER", help="data set in place of the run's own; its val/ is enough")
    parser.add_argument("--model", metavar="NAME", help="package.module:factory, if the network is one of your own")
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="images a step in place of the run's own")
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="side of the images; default: its own"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    world = open_world(options.device)
    changes = (options.data, options.batch_size, options.image_size, options.model)
    result, cost = evaluate_checkpoint(options.checkpoint, world, *changes)
    if world.is_main:
        print(
            f"top-1 {result.top1:.3f}%  top-5 {result.top5:.3f}%  {result.images} images  "
            f"{cost.flops / 1e9:.4f} GFLOPs  {cost.params:,} parameters"
        )
    world.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
