"""One-shot CUP: cut a trained network once, show what goes, and write the rest for retraining.

python launch/prune.py runs/demo/best.pt --reduction 2.2
python launch/prune.py resnet18 --weights resnet18-f37072fd.pth --t 0.65 --dendrogram trees/
python launch/prune.py runs/demo/best.pt --latency 12ms --device cpu --batch 1
"""

import copy
import sys
from argparse import Namespace
from pathlib import Path

# A script's own folder comes first on the path, and there `train` is launch/train.py: put the root in its place.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cup
from cup import ChannelGroup, GroupCut, PlanOptions, PrunePlan
from launch.dendrogram import draw_dendrograms
from launch.devices import KNOWN, device_name
from launch.latency import Latency, latency_plan, report_latency, seconds
from train.checkpoint.network import StoredNetwork, load_network, save_network
from train.cli import Parser, exit_code_of, positive_int
from train.errors import ConfigError, TrainError
from train.prune import Cut, cut_network, network_from_weights, read_counts


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 for a wrong argument, 1 for any other error that a user can cause."""
    return exit_code_of(lambda: _prune(argv), "--debug" in argv)


def _prune(argv: list[str]) -> None:
    options = _parse(argv)
    settings = _plan_options(options)
    network, note = _open_source(options)
    groups = network.groups or cup.channel_groups(network.model, network.architecture.example_input())
    latency = Latency.of(options, network) if options.latency else None
    if latency is not None:
        plan = latency_plan(latency, network, groups, settings, options.drop_blocks)
    else:
        plan = _plan(options, network, groups, settings)
    if plan.changes_nothing:
        why = f": {plan.note}" if plan.note else ", ask for a deeper one"
        raise TrainError(f"this cut removes no channel of {options.source}, nothing was written{why}")
    trees = _trees(network, groups, plan, settings) if options.dendrogram else []  # read before the model is cut
    before = copy.deepcopy(network.model) if latency is not None else network.model
    cut = cut_network(network, plan, groups)
    out = _free_out(options, cut)
    if options.dendrogram:
        draw_dendrograms(trees, plan.threshold, options.dendrogram)
    save_network(out, cut.network, cut.widths)
    print(_report(plan, cut))
    if note:
        print(note)
    if latency is not None:
        print(report_latency(latency, cut, before))
    print(f"written: {out}")


def _parse(argv: list[str]) -> Namespace:
    parser = Parser(prog="launch/prune.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint, or with --weights a network's name")
    depth = parser.add_mutually_exclusive_group(required=True)
    depth.add_argument("--t", type=float, help="remove what the criterion puts up to this height")
    depth.add_argument("--reduction", type=float, metavar="FR", help="FLOPs down by this factor of the full network's")
    depth.add_argument("--counts", type=Path, metavar="FILE", help="JSON or YAML: group name -> channels that stay")
    depth.add_argument(
        "--latency", type=seconds, metavar="TIME", help="one forward pass in this time, as 12ms; with --device"
    )
    parser.add_argument(
        "--device",
        type=device_name("cpu", "cuda"),
        metavar="DEVICE",
        help=f"with --latency: whose time; on cpu and cuda cuts are timed here until it is met; as modelled: {KNOWN}",
    )
    parser.add_argument("--batch", type=positive_int, metavar="N", help="with --latency: images (default: 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="with --latency (default: fp32)")
    parser.add_argument("--drop-blocks", action="store_true", help="with --latency: whole residual blocks may go, too")
    defaults = PlanOptions()
    parser.add_argument(
        "--criterion", choices=tuple(cup.CRITERIA), default=defaults.criterion, help="which channels go first"
    )
    parser.add_argument(
        "--scope", choices=("inner", "all"), help="all = residual streams too (default: inner; with --latency all)"
    )
    parser.add_argument(
        "--round-to", type=positive_int, default=defaults.round_to, metavar="N", help="widths, rounded up"
    )
    parser.add_argument(
        "--min-channels", type=positive_int, default=defaults.min_channels, metavar="N", help="least width"
    )
    features = ("both", "incoming", "outgoing")
    parser.add_argument("--features", choices=features, default=defaults.features, help="cup: what describes a filter")
    parser.add_argument(
        "--weights", metavar="FILE", help="the named network's: .pth, .safetensors, or as in model.weights"
    )
    parser.add_argument(
        "--num-classes", type=positive_int, metavar="N", help="of the named network; default: read from FILE"
    )
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="of the named network; default: its own"
    )
    parser.add_argument("--model", metavar="NAME", help="package.module:factory, if the network is one of your own")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: SOURCE_frX.XX.pt, X.XX being the FR reached")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--dendrogram", type=Path, metavar="DIR", help="cup: draw each group's tree and cut")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def _open_source(options: Namespace) -> tuple[StoredNetwork, str]:
    """The network, and what of a file of weights was not taken, in words for the user."""
    if options.weights is not None:
        if options.model is not None:
            raise ConfigError("--model goes with a checkpoint: with --weights the network's name is SOURCE")
        return network_from_weights(options.source, options.weights, options.num_classes, options.image_size)
    if options.num_classes is not None or options.image_size is not None:
        raise ConfigError("--num-classes and --image-size go with --weights: a checkpoint says its own")
    if not Path(options.source).exists():
        raise ConfigError(f"no checkpoint at {options.source}; a network by name needs its weights too: --weights FILE")
    return load_network(Path(options.source), options.model), ""


def _plan_options(options: Namespace) -> PlanOptions:
    if options.criterion != "cup" and options.features != PlanOptions().features:
        raise ConfigError(f"--features goes with --criterion cup: {options.criterion} describes filters its own way")
    names = ("criterion", "features", "scope", "round_to", "min_channels")
    if (options.latency is None) != (options.device is None):
        raise ConfigError("--latency and --device go together: whose time is it?")
    if options.latency is None and (options.batch or options.precision):
        raise ConfigError("--batch and --precision go with --latency: FLOPs are those of one image")
    if options.latency is None and options.drop_blocks:
        raise ConfigError("--drop-blocks goes with --latency: what a block gives is weighed against its time")
    options.scope = options.scope or ("inner" if options.latency is None else "all")
    return PlanOptions(**{name: getattr(options, name) for name in names})


def _plan(options: Namespace, network: StoredNetwork, groups: list[ChannelGroup], settings: PlanOptions) -> PrunePlan:
    if options.t is not None:
        return cup.plan_by_threshold(network.model, groups, options.t, settings)
    if options.counts is not None:
        return cup.plan_by_counts(network.model, groups, read_counts(options.counts), settings)
    reached = network.dense.flops / cup.complexity(network.model, network.architecture.example_input()).flops
    if 1 < options.reduction <= reached:
        raise ConfigError(
            f"--reduction: found {options.reduction:g}, but FR is {reached:.3f} already; allowed: above it"
        )
    return cup.plan_by_reduction(network.model, groups, options.reduction, settings, dense_flops=network.dense.flops)


def _trees(
    network: StoredNetwork, groups: list[ChannelGroup], plan: PrunePlan, settings: PlanOptions
) -> list[GroupCut]:
    """The dendrograms that the plan was cut from. Raises ConfigError where the criterion makes none."""
    counts = plan.new_widths
    cuts = cup.cut_groups(network.model, groups, lambda group, ranking: counts[group.name], settings, plan.dropped)
    if any(cut.ranking.tree is None for cut in cuts):
        raise ConfigError(f"--dendrogram: found --criterion {settings.criterion}, which makes no tree; allowed: cup")
    return cuts


def _free_out(options: Namespace, cut: Cut) -> Path:
    """Where to write: by default beside a checkpoint, and for a network by name in the working folder."""
    suffix = f"_fr{cut.reduction_after:.2f}.pt"
    if options.out is not None:
        out = options.out
    elif options.weights is not None:
        out = Path(options.source.replace(":", "_") + suffix)
    else:
        out = Path(options.source).with_name(Path(options.source).stem + suffix)
    if out.exists() and not options.force:
        raise ConfigError(f"{out} is there already: give another --out, or --force to overwrite it")
    return out


def _report(plan: PrunePlan, cut: Cut) -> str:
    widths = [("group", "width", "->", "removed")]
    widths += [
        (name, str(plan.widths[name]), str(kept), str(plan.widths[name] - kept))
        for name, kept in plan.new_widths.items()
    ]
    before, after = cut.before, cut.after
    costs = [
        ("", "before", "after"),
        ("FLOPs (paper's counting)", f"{before.flops / 1e6:,.3f} M", f"{after.flops / 1e6:,.3f} M"),
        ("multiply-adds", f"{before.macs / 1e6:,.3f} M", f"{after.macs / 1e6:,.3f} M"),
        ("parameters", f"{before.params:,}", f"{after.params:,}"),
        ("FR of the full network", f"{cut.reduction_before:.3f} x", f"{cut.reduction_after:.3f} x"),
    ]
    at = [] if plan.threshold is None else [f"cut at t {plan.threshold:.4f}"]
    notes = [f"blocks dropped: {', '.join(plan.dropped)}"] if plan.dropped else []
    notes += [f"note: {plan.note}"] if plan.note else []
    return "\n".join([_table(widths), "", _table(costs), *at, *notes])


def _table(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
