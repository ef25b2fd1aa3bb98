"""What a training will take, before anything is paid for: hours, money, memory and images a second, by modelled steps.

python launch/plan.py RECIPE --device h100-sxm --gpus 8 --price 2.5 [--reductions FR ...] [--speedups X ...]

RECIPE: a name (launch/train.py --recipe list) or a YAML file, first; settings as of launch/train.py may follow. No data
and no GPU are needed. What is modelled and what is left out: docs/performance.md.
"""

import math
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import cup
from data.batch import preprocessing_of
from launch.benches.measure import write_result
from launch.devices import KNOWN, device_name
from launch.projections.memory import GIB
from launch.projections.network import Network
from launch.projections.variants import Estimate, Projection, Variant, to_reduction, to_speedup
from train.build import freeze
from train.cli import Parser, exit_code_of, non_negative_int, positive_int
from train.config import RunConfig, parse_config
from train.errors import ConfigError
from train.loop.config import TrainConfig
from train.methods import PruneConfig
from train.network.calibration import known_device
from train.network.models import build_model
from train.preprocessing import settled
from train.prune import network_from_weights
from train.recipes import DEFAULT, with_recipe_first

IMAGES_PER_CORE = 323
"""JPEGs of ImageNet's size that one core decodes and augments in a second: DALI from a folder with one thread on a core
of an AMD EPYC virtual machine, the median in results/loader.json."""


CLASSES = 1000
"""ImageNet's."""


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _main(argv), "--debug" in argv)


def _main(argv: list[str]) -> None:
    options, config = _parse(argv)
    projection = build_projection(config, options)
    for note in filter(None, (_why_not_planned(config.prune), _what_teaching_adds(config.train))):
        print(note)
    variants = list(chosen_variants(projection, config, options.reductions, options.speedups))
    estimates = [projection.estimate(variant) for variant in variants]
    _print(estimates, config, options)
    if options.out:
        content = {
            "what": "modelled, not measured",
            "device": options.device,
            "gpus": options.gpus,
            "images_per_core": options.images_per_core,
            "config": config.to_dict(),
            "variants": [estimate.to_dict() for estimate in estimates],
        }
        write_result(options.out, content)


def _parse(argv: list[str]) -> tuple[Namespace, RunConfig]:
    parser = Parser(prog="launch/plan.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE", help="a name, or a YAML file")
    parser.add_argument(
        "--device",
        type=device_name(),
        metavar="DEVICE",
        required=True,
        help=f"whose step times are modelled: {KNOWN}",
    )
    parser.add_argument("--gpus", type=positive_int, default=1, metavar="N", help="of that kind, all the time")
    parser.add_argument("--price", type=_price, metavar="MONEY", help="of one of them for an hour")
    parser.add_argument(
        "--reductions", type=_above_one, nargs="*", default=[2.2], metavar="FR", help="inner groups (default: 2.2)"
    )
    parser.add_argument(
        "--speedups", type=_above_one, nargs="*", default=[1.6, 2.0], metavar="X", help="all groups (default: 1.6 2)"
    )
    parser.add_argument("--images", type=positive_int, default=1281167, metavar="N", help="default: ImageNet's 1281167")
    parser.add_argument("--val-images", type=non_negative_int, default=50000, metavar="N", help="default: 50000")
    parser.add_argument(
        "--classes", type=positive_int, metavar="N", help=f"default: {CLASSES}; with --weights, theirs and no others"
    )
    parser.add_argument("--weights", metavar="FILE", help="trained weights of the full network (default: fresh ones)")
    parser.add_argument(
        "--images-per-core",
        type=positive_int,
        default=IMAGES_PER_CORE,
        metavar="N",
        help=f"that one core loads in a second, as bench.py loader measures it (default: {IMAGES_PER_CORE})",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options, settings = parser.parse_known_args(argv)
    recipe = "--config" if Path(options.recipe).suffix in (".yaml", ".yml") else "--recipe"
    config = parse_config(with_recipe_first([recipe, options.recipe, *settings]), "launch/plan.py", DEFAULT)
    return options, replace(config, data=settled(config.data, None))


def _price(text: str) -> float:
    return _number(text, lambda value: value > 0, "a number above 0")


def _above_one(text: str) -> float:
    return _number(text, lambda value: value > 1, "a number above 1")


def _number(text: str, is_allowed: Callable[[float], bool], allowed: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and is_allowed(value)):
        raise ArgumentTypeError(f"found {text!r}, allowed: {allowed}")
    return value


def build_projection(config: RunConfig, options: Namespace) -> Projection:
    """The recipe's training on `options.gpus` devices.

    Raises ConfigError for a network that does not begin at full width, and for a batch that is not for so many devices.
    """
    for name, neutral in (("checkpoint", None), ("widths", None), ("width", 1.0)):
        if (found := getattr(config.model, name)) != neutral:
            raise ConfigError(f"model.{name}: found {found}, allowed: {neutral}, for plans begin at full width")
    at_once = options.gpus * config.train.accumulate
    if config.data.batch_size % options.gpus or config.data.batch_size < at_once:
        raise ConfigError(
            f"data.batch_size: found {config.data.batch_size}, allowed: a multiple of --gpus ({options.gpus}), "
            f"from {at_once} on"
        )
    network = _network(config, options)
    cost = cup.device_cost(
        known_device(options.device, config.train.precision),
        batch_size=config.data.batch_size // at_once,
        fused=config.train.compile == "blocks",
    )
    return Projection(config, network, cost, options.images, options.val_images)


def _network(config: RunConfig, options: Namespace) -> Network:
    name, side = config.model.name, config.data.image_size
    if options.weights is None:
        torch.manual_seed(config.run.seed)
        model = build_model(name, options.classes or CLASSES, side)
    elif options.classes is not None:
        raise ConfigError(f"--classes: found {options.classes}, allowed: none with --weights, which have their own")
    else:
        model = network_from_weights(name, options.weights, None, side)[0].model
    freeze(model, config.train.frozen)
    return Network.of(model, (config.data.channels, side, side))


def chosen_variants(
    projection: Projection, config: RunConfig, reductions: Sequence[float], speedups: Sequence[float]
) -> Iterator[Variant]:
    """Dense, the recipe's own target, and those asked for; each with growing images, too, where the recipe has them."""
    ours = config.prune
    wanted = {} if not _is_planned(ours) else {f"recipe: {_target_label(ours)}": ours}
    for prune in (*(to_reduction(ours, fr) for fr in reductions), *(to_speedup(ours, x) for x in speedups)):
        if f"recipe: {_target_label(prune)}" not in wanted:
            wanted[_target_label(prune)] = prune
    ramps = (projection.to_target(label, prune) for label, prune in wanted.items())
    for variant in (projection.dense(), *ramps):
        yield variant
        if config.data.start_size:
            yield projection.growing(variant)


def _target_label(prune: PruneConfig) -> str:
    target = f"speed-up {prune.target_speedup:g}" if prune.target_speedup else f"FR {prune.target_reduction:g}"
    return f"{target}, {prune.scope} groups"


def _is_planned(prune: PruneConfig) -> bool:
    """Whether the recipe shrinks in a way that can be told before the training."""
    return prune.method == "hard_ramp" and prune.target is not None


def _why_not_planned(prune: PruneConfig) -> str:
    """Why the recipe's own way of shrinking has no row; "" where it has one, and where it does not shrink."""
    if _is_planned(prune) or not prune.shrinks:
        return ""
    if prune.method != "hard_ramp":
        return f"no row for the recipe's prune.method {prune.method}: when it cuts depends on the training"
    return "no row for the recipe's ramp: without a target it depends on the training"


def _what_teaching_adds(train: TrainConfig) -> str:
    """What a teacher costs that is not modelled; "" without one."""
    if train.teacher is None:
        return ""
    return f"not in it: the teacher's forward pass in each step, and its memory (train.teacher {train.teacher})"


def _print(estimates: Sequence[Estimate], config: RunConfig, options: Namespace) -> None:
    local = config.data.batch_size // options.gpus // config.train.accumulate
    val_side = preprocessing_of(config.data).validation.image_size
    validated = "" if val_side == config.data.image_size else f" ({val_side} in validation)"
    how = f"{config.train.precision}, {'compiled' if config.train.compile == 'blocks' else 'eager'}"
    print(
        f"Modelled, not measured: {config.model.name}, {config.train.epochs} epochs of {options.images:,} images, "
        f"{config.data.image_size} pixels{validated}, on {options.gpus} x {options.device}, {how}, "
        f"{local} images each at once"
    )
    money = ["money"] if options.price else []
    rows = [["variant", "FR", "speed-up", "hours", "GPU hours", *money, "saved", "GiB a GPU", "images/s", "cores"]]
    for estimate in estimates:
        cost = [f"{estimate.gpu_hours * options.price:,.2f}"] if options.price else []
        images_per_s = options.gpus * estimate.images_per_s
        rows.append(
            [
                estimate.label,
                f"{estimate.flops_reduction:.2f}",
                f"{estimate.speedup:.2f}",
                f"{estimate.gpu_hours / options.gpus:.2f}",
                f"{estimate.gpu_hours:.2f}",
                *cost,
                f"{100 * (1 - estimate.gpu_hours / estimates[0].gpu_hours):.1f}%",
                f"{estimate.memory.total / GIB:.1f}",
                f"{images_per_s:,.0f}",
                f"{math.ceil(images_per_s / options.images_per_core)}",
            ]
        )
    print(_table(rows))
    for estimate in estimates:
        if estimate.note:
            print(f"{estimate.label}: {estimate.note}")
    last = config.prune.last_epoch or config.train.epochs
    print(
        f"Targets are reached in a straight line by epoch {last}, planned on "
        f"{'fresh weights' if options.weights is None else options.weights}. FR and speed-up: at the end, images of "
        f"full size. Memory: estimated, at its highest; images/s: what all GPUs take at their fastest; cores: at "
        f"{options.images_per_core:,} images/s each. Not in it: all-reduce, waiting for data, resizes, compiling."
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, as Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    rule = " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
