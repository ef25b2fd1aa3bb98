"""Exact top-1 and top-5 of a network at its widths: a checkpoint's, an exported folder's, or an ONNX file's.

python launch/evaluate.py runs/demo/best.pt [--data FOLDER]      (torchrun shares the work among ranks)
"""

import sys
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.cli import Parser, end_with, exit_code_of, positive_int
from train.evaluate import DataChanges, Outcome, evaluate_stored
from train.peers import Peers
from train.world import open_world


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _evaluate(argv), "--debug" in argv)


def _evaluate(argv: list[str]) -> None:
    parser = Parser(prog="launch/evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "network",
        type=Path,
        help="checkpoint (of a run or of launch/prune.py), folder of launch/export.py, or .onnx file",
    )
    parser.add_argument("--data", metavar="FOLDER", help="data set in place of the run's own; its val/ is enough")
    parser.add_argument("--model", metavar="NAME", help="package.module:factory, if the network is one of your own")
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="images a step in place of the run's own")
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="side of the images; default: as the network's"
    )
    parser.add_argument("--loader", choices=("auto", "dali", "folder"), help="in place of the run's own")
    parser.add_argument("--per-class", action="store_true", help="also the accuracy of each class, lowest first")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    changes = DataChanges(
        path=options.data, loader=options.loader, batch_size=options.batch_size, image_size=options.image_size
    )
    world = open_world(options.device)
    with Peers(world):
        outcome = evaluate_stored(options.network, world, changes, options.model)
    if world.is_main:
        print(_summary(outcome))
        if options.per_class:
            print(_table(outcome))
    world.close()


def _summary(outcome: Outcome) -> str:
    result, cost = outcome.evaluation, outcome.cost
    accuracy = f"top-1 {result.top1:.3f}%  top-5 {result.top5:.3f}%  {result.images} images"
    return f"{accuracy}  {cost['flops'] / 1e9:.4f} GFLOPs  {cost['params']:,} parameters" if cost else accuracy


def _table(outcome: Outcome) -> str:
    """Images and top-1 of each class, the lowest first; classes without images are left out."""
    result = outcome.evaluation
    names = outcome.classes or [str(label) for label in range(len(result.class_images))]
    rows = [
        (100 * hits / images, images, name)
        for name, images, hits in zip(names, result.class_images, result.class_hits, strict=True)
        if images
    ]
    width = max(len("class"), *(len(name) for _, _, name in rows))
    lines = [f"{name:<{width}}  {images:>7,}  {top1:>10.2f}" for top1, images, name in sorted(rows)]
    return "\n".join([f"{'class':<{width}}  {'images':>7}  {'top-1 (%)':>10}", *lines])


if __name__ == "__main__":
    end_with(main)
