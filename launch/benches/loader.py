"""Images a second: DALI beside torchvision's DataLoader at equal threads, from an image folder and from shards.

Every contender reads the same training images from a warm page cache, takes a random crop, flips, resizes and
normalises. torchvision's way is ImageFolder with a DataLoader, as its own training script has it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from data import DataConfig, DataError, build_loaders
from data.batch import MEAN_RGB, STD_RGB
from data.images import list_splits
from data.prepare import prepare_shards
from launch.benches.measure import machine, rounds_in_turn, summary, with_spread, write_result
from train.cli import positive_int
from train.world import World, open_world

IMAGES_PER_SHARD = 200
SKIPPED_STEPS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="image folder (train/, val/)")
    parser.add_argument("--rounds", type=positive_int, default=10, metavar="N", help="after a warm-up (default: 10)")
    parser.add_argument(
        "--threads", type=positive_int, nargs="+", default=[1, 2, 4], metavar="N", help="default: 1 2 4"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--image-size", type=positive_int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")


def measure(options: argparse.Namespace) -> None:
    """Measure, print the table, write the result."""
    _require_image_folder(options.data)
    world = open_world(options.device)
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        prepare_shards(options.data, shards, images_per_shard=IMAGES_PER_SHARD)
        contenders: dict[str, Callable[[], float]] = {}
        for threads in options.threads:
            for name, path, loader in (
                ("DALI, folder", options.data, "dali"),
                ("DALI, shards", shards, "dali"),
                ("our folder loader", options.data, "folder"),
            ):
                contenders[f"{name}, {threads} thread(s)"] = _ours(options, path, loader, threads, world)
            contenders[f"torchvision, {threads} worker(s)"] = _torchvision(options, threads, world)
        results = rounds_in_turn(contenders, options.rounds)
    what = f"{options.image_size} pixels, batches of {options.batch_size}, {world.device.type}"
    print(f"{what}: images/s, median (spread)")
    for name, values in results.items():
        print(f"  {name:<36} {with_spread(values, digits=0)}")
    if options.out:
        images_per_s = {name: summary(values) for name, values in results.items()}
        machine_now = machine("torchvision", "nvidia-dali-cuda130", "Pillow")
        write_result(
            options.out, {"benchmark": f"loader, {what}", "machine": machine_now, "images_per_s": images_per_s}
        )


def _require_image_folder(path: Path) -> None:
    """DataError for anything else: torchvision's way reads image folders only."""
    train, _ = list_splits(path)
    if train.places is not None or train.root != path / "train":
        found = "file lists" if train.places is None else "shards"
        raise DataError(f"{path}: found {found}, allowed: an image folder, as torchvision reads no other: give one")


def _ours(options: argparse.Namespace, path: Path, loader: str, threads: int, world: World) -> Callable[[], float]:
    """One of this project's loaders; on a GPU its batches arrive there, and DALI decodes there."""
    config = DataConfig(
        path=str(path),
        loader=loader,
        threads=threads,
        batch_size=options.batch_size,
        image_size=options.image_size,
        resize_size=options.image_size,
    )

    def images_per_s() -> float:
        train, val = build_loaders(config, rank=0, world_size=1, device=world.device, seed=0)
        try:
            if len(train) < 2 * SKIPPED_STEPS:
                raise DataError(
                    f"{path}: {train.num_images} images make {len(train)} batches of {options.batch_size}, too few to "
                    f"measure, at least {2 * SKIPPED_STEPS} are needed: take more images or a smaller --batch-size"
                )
            return _rate((batch.images for batch in train), world)
        finally:
            train.close()
            val.close()

    return images_per_s


def _torchvision(options: argparse.Namespace, workers: int, world: World) -> Callable[[], float]:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(options.image_size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN_RGB, STD_RGB),
        ]
    )
    images = ImageFolder(options.data / "train", transform)

    def images_per_s() -> float:
        loader = DataLoader(
            images,
            options.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            multiprocessing_context="forkserver",  # DALI has threads here, and a fork of them can hang
        )
        return _rate((batch for batch, _ in loader), world)

    return images_per_s


def _rate(batches: Iterable[torch.Tensor], world: World) -> float:
    """Images a second of one epoch; its first batches, and with them the start of threads or workers, are left out."""
    images = 0
    for step, batch in enumerate(batches):
        images += len(batch) if step >= SKIPPED_STEPS else 0
        if step == SKIPPED_STEPS - 1:
            start = time.perf_counter()
    world.synchronize()
    return images / (time.perf_counter() - start)
