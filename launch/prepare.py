"""Make, fetch, pack or check a data set.

python launch/prepare.py digits|mnist|cifar10|cifar100 datasets/NAME
python launch/prepare.py imagenette datasets/imagenette [--size 160px]
python launch/prepare.py imagenet ARCHIVES datasets/imagenet
python launch/prepare.py shards SOURCE datasets/NAME-shards [--images-per-shard 1000] [--short-side 320 --quality 90]
python launch/prepare.py index datasets/SHARDS
python launch/prepare.py subset SOURCE datasets/NAME --train N --val N
python launch/prepare.py check datasets/NAME [--all]
"""

import argparse
import sys
from functools import partial
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import DataError, prepare
from data.images import exclude_file
from train.cli import Parser, exit_code_of, non_negative_int, positive_int

NAMED_OF_EACH_KIND = 5
MAKERS = {
    "digits": lambda options: prepare.prepare_digits(options.path),
    "mnist": lambda options: prepare.prepare_mnist(options.path),
    "cifar10": lambda options: prepare.prepare_cifar10(options.path),
    "cifar100": lambda options: prepare.prepare_cifar100(options.path),
    "imagenette": lambda options: prepare.prepare_imagenette(options.path, options.size),
    "imagenet": lambda options: prepare.prepare_imagenet(options.archives, options.path),
    "shards": lambda options: prepare.prepare_shards(
        options.source,
        options.path,
        images_per_shard=options.images_per_shard,
        seed=options.seed,
        exclude=options.exclude,
        smaller=_smaller(options),
    ),
    "subset": lambda options: prepare.prepare_subset(options.source, options.path, options.train, options.val),
    "index": lambda options: prepare.index_shards(options.path),
}


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause, broken images included."""
    return exit_code_of(lambda: _prepare(argv), "--debug" in argv)


def _prepare(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.command == "check":
        _check(options)
    else:
        written = MAKERS[options.command](options)
        print(f"ready: {options.path}" if written else f"{options.path}: a data set is there already; kept as it is")


def _parser() -> Parser:
    parser = Parser(prog="launch/prepare.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    digits = commands.add_parser("digits", help="scikit-learn's 1,797 handwritten digits; no download")
    mnist = commands.add_parser("mnist", help="70,000 handwritten digits, grey, 28x28; a download of 12 MB")
    cifar10 = commands.add_parser("cifar10", help="60,000 images of 10 classes, 32x32; a download of 170 MB")
    cifar100 = commands.add_parser("cifar100", help="60,000 images of 100 classes, 32x32; a download of 169 MB")
    imagenette = commands.add_parser("imagenette", help="13,394 photographs of ten ImageNet classes; a download")
    imagenet = commands.add_parser("imagenet", help="ImageNet from its official archives; goes on where it stopped")
    shards = commands.add_parser("shards", help="pack a data set into WebDataset shards, shuffled across classes")
    index = commands.add_parser("index", help="make a data set of WebDataset shards from elsewhere, where they lie")
    subset = commands.add_parser("subset", help="fewer images of an image folder, classes in proportion")
    check = commands.add_parser("check", help="decode every image, list what training must leave out, compare classes")

    imagenet.add_argument("archives", type=Path, metavar="ARCHIVES", help="folder of the three official archives")
    shards.add_argument("source", type=Path, metavar="SOURCE", help="data set in any form, also hf:FOLDER")
    subset.add_argument("source", type=Path, metavar="SOURCE", help="image folder")
    subset.add_argument("--train", type=positive_int, required=True, metavar="N", help="images of training")
    subset.add_argument("--val", type=positive_int, required=True, metavar="N", help="images of validation")
    for maker in (digits, mnist, cifar10, cifar100, imagenette, imagenet, shards, subset):
        maker.add_argument("path", type=Path, metavar="FOLDER", help="where to write it; a finished set is kept")
    index.add_argument("path", type=Path, metavar="FOLDER", help="shards: train/*.tar and val/*.tar")
    imagenette.add_argument("--size", choices=("full", "320px", "160px"), default="full", help="of the shorter side")
    shards.add_argument("--images-per-shard", type=positive_int, default=1000, metavar="N", help="default: 1000")
    shards.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="of the order (default: 0)")
    shards.add_argument("--exclude", default="", metavar="FILE", help="default: SOURCE/exclude.txt, if it is there")
    shards.add_argument(
        "--short-side", type=positive_int, metavar="PIXELS", help="make larger training images so large, as JPEGs"
    )
    shards.add_argument("--quality", type=positive_int, metavar="N", help="of these JPEGs (default: 90)")

    check.add_argument("path", type=Path, metavar="FOLDER", help="data set in any form, also hf:FOLDER")
    check.add_argument("--exclude", default="", metavar="FILE", help="list to write (default: FOLDER/exclude.txt)")
    check.add_argument("--all", action="store_true", help="name all unusual images and files, not some of each kind")
    check.add_argument("--threads", type=non_negative_int, default=0, metavar="N", help="default: some more than cores")
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _smaller(options: argparse.Namespace) -> prepare.Smaller | None:
    if options.short_side:
        return prepare.Smaller(options.short_side, options.quality or prepare.Smaller.quality)
    if options.quality:
        raise DataError("--quality is that of images made smaller: give --short-side PIXELS, too")
    return None


def _check(options: argparse.Namespace) -> None:
    show = partial(_print_report, most=sys.maxsize if options.all else NAMED_OF_EACH_KIND)
    report = prepare.check_data(options.path, exclude=options.exclude, threads=options.threads, show=show)
    if report.broken:
        listed = exclude_file(options.path, options.exclude)
        raise DataError(f"found broken: {len(report.broken)}; training leaves out what {listed} now lists")
    print("all of them can be trained on")


def _print_report(report: prepare.CheckReport, most: int) -> None:
    """most: names of each kind of unusual ones; what is broken is named in full."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be in another encoding
    for name, reason in report.broken.items():
        print(f"{_on_a_line(name)}: {reason}")
    for reason in sorted(set(report.unusual.values())):
        _print_some(f"fine, but {reason}", [name for name, found in report.unusual.items() if found == reason], most)
    _print_some("not read by any loader, for name or place", report.unread, most)
    print(f"{', '.join(f'{count:,} images in {split}' for split, count in report.images.items())}")


def _print_some(what: str, names: list[str], most: int) -> None:
    if names:
        more = f" and {len(names) - most:,} more (--all names them)" if len(names) > most else ""
        print(f"{what}: {', '.join(map(_on_a_line, names[:most]))}{more}")


def _on_a_line(name: str) -> str:
    """The name with its tabs and line breaks spelled out."""
    return name.translate({ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
