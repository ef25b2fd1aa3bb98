"""What a run of a grid consists of: at most one command before it, and the training."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

import cup
from data import DataConfig, prepare_data
from data.batch import preprocessing_of
from data.images import folder_of, list_splits
from launch.grids.disk import NOTHING, Cost, Disk, read_json, write_json, write_text
from launch.grids.grid import command_words
from launch.grids.jobs import MADE_OF_ITS_COST, Job
from train.config import RunConfig
from train.errors import TrainError
from train.network.models import Architecture, build_model

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Command:
    """A program that has to run once before the training. writes: what is there when it has."""

    argv: list[str]
    writes: Path


def command_before(job: Job, disk: Disk) -> Command | None:
    """What makes the network that the training begins with; None where it begins with nothing but its seed.

    The job's needs must be finished.
    """
    options = job.options
    if job.entry.kind == "cut":
        out = disk.made(job.name, ".pt")
        source = disk.run_dir(job.needs[0]).last
        values = {
            "reduction": options.target_reduction,
            "criterion": options.criterion,
            "scope": options.scope,
            "round-to": options.round_to,
            "min-channels": options.min_channels,
            **({"features": options.features} if options.criterion == "cup" else {}),
            "out": out,
        }
        named = [text for key, value in values.items() for text in (f"--{key}", str(value))]
        return Command([sys.executable, str(ROOT / "launch/prune.py"), str(source), *named, "--force"], out)
    if job.entry.kind == "search":
        out = disk.made(job.name, ".json")
        known = {
            "python": sys.executable,
            "launch": str(ROOT / "launch"),
            "run": str(disk.run_dir(job.needs[0]).path) if job.needs else "",
            "config": str(disk.config(job.name)),
            "reduction": options.target_reduction,
            "seed": job.seed,
            "out": str(out),
        }
        return Command(command_words(job.entry.command, known), out)
    return None


def final_config(job: Job, jobs: dict[str, Job], disk: Disk) -> RunConfig:
    """The configuration of the training, with what follows from other runs. The job's needs must be finished."""
    config, kind = job.config, job.entry.kind
    if kind == "equal_hours":
        network, method = (jobs[name] for name in job.needs)
        model = final_config(network, jobs, disk).model
        epochs = _epochs_that_cost(spent(method, jobs, disk), network, disk)
        return with_epochs(replace(config, model=model), epochs)
    if kind == "cut":
        # what the dense network began with is in the checkpoint
        model = {"checkpoint": str(disk.made(job.name, ".pt")), "weights": None, "width": 1.0, "widths": None}
    elif kind in ("search", "thin"):
        model = {"widths": str(disk.made(job.name, ".json"))}
    elif kind == "shape":
        model = {"widths": str(disk.run_dir(job.needs[0]).last)}
    else:
        model = {}
    return replace(config, model=replace(config.model, **model))


def prepare(job: Job, config: RunConfig, disk: Disk) -> None:
    """Write the recipe that the training is started with, which runs it is made from, and a thin network's widths.

    Raises TrainError where they cannot be written.
    """
    if job.entry.kind == "thin":
        write_json(disk.made(job.name, ".json"), thin_widths(job))
    write_text(disk.config(job.name), yaml.safe_dump(config.to_dict(), sort_keys=False))
    origin = disk.origin_now(job)
    if read_json(disk.origin(job.name)) != origin:  # what a command has made is of no use any more
        disk.command(job.name).unlink(missing_ok=True)
    write_json(disk.origin(job.name), origin)


def thin_widths(job: Job) -> dict[str, int]:
    """Group -> channels of the uniformly thinner network whose FR is the nearest to the target."""
    config, options = job.config, job.options.plan_options()
    side = preprocessing_of(config.data).image_size  # a recipe need not say it
    architecture = Architecture(
        name=config.model.name,
        num_classes=_num_classes(config.data),
        input_shape=(config.data.channels, side, side),
    )
    model = build_model(architecture.name, architecture.num_classes, side)
    groups = cup.channel_groups(model, architecture.example_input())
    return cup.uniform_widths_at(cup.View(model, groups), job.options.target_reduction, options)


def spent(job: Job, jobs: dict[str, Job], disk: Disk) -> Cost:
    """What a finished job cost, with the training of the network that it was cut from, or that its search read."""
    counted = job.needs if job.entry.kind in MADE_OF_ITS_COST else ()
    return sum((spent(jobs[name], jobs, disk) for name in counted), start=NOTHING) + disk.own_cost(job.name)


def with_epochs(config: RunConfig, epochs: int) -> RunConfig:
    """The same training in fewer epochs or more: what the schedule says in epochs is scaled along."""
    ratio, data = epochs / config.train.epochs, config.data
    milestones = sorted({max(1, round(one * ratio)) for one in config.optim.milestones})
    return replace(
        config,
        train=replace(config.train, epochs=epochs),
        optim=replace(
            config.optim,
            milestones=tuple(milestones),
            warmup_epochs=config.optim.warmup_epochs * ratio,
        ),
        data=replace(data, grow_epochs=max(1 if data.start_size else 0, round(data.grow_epochs * ratio))),
    )


def epochs_for(cost: float, costs: Sequence[float], at_end: float) -> int:
    """How many epochs of a run cost the nearest to `cost`, at least one.

    costs: what it had cost at the end of each epoch. at_end: what it cost in all. What comes before the first epoch
    and after the last one costs the same however many there are.
    """
    first, last, count = costs[0], costs[-1], len(costs)
    an_epoch = (last - first) / (count - 1) if count > 1 else first
    return max(1, 1 + round((cost - (at_end - last) - first) / an_epoch))


def _epochs_that_cost(cost: Cost, network: Job, disk: Disk) -> int:
    lines = [event for event in disk.events(network.name) if event["event"] == "epoch"]
    done = disk.done(network.name)
    counted = [line.get("cpu_seconds") for line in (*lines, done)]
    if cost.cpu is not None and None not in counted and done["device"] == "cpu":
        hours, total = [seconds / 3600 for seconds in counted], cost.cpu
    else:
        hours, total = [line["gpu_hours"] for line in (*lines, done)], cost.wall
    return epochs_for(total, hours[:-1], hours[-1])


def _num_classes(data: DataConfig) -> int:
    """Raises TrainError where the data set is not there, DataError where it is none."""
    if data.loader == "synthetic":
        return data.synthetic_classes
    prepare_data(data)
    if not folder_of(data.path).exists():
        raise TrainError(f"data.path: nothing is at {data.path}: prepare the data set first (launch/prepare.py)")
    return len(list_splits(data.path, data.exclude)[0].classes)


def training(config_file: Path, ranks: int) -> list[str]:
    """The command of the training: torchrun where there are several ranks."""
    script = [str(ROOT / "launch/train.py"), "--config", str(config_file)]
    if ranks == 1:
        return [sys.executable, *script]
    torchrun = Path(sys.executable).with_name("torchrun")  # of this interpreter, whatever PATH says
    return [str(torchrun), "--standalone", f"--nproc-per-node={ranks}", *script]
