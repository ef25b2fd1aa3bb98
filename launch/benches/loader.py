"""Images a second: DALI beside torchvision's DataLoader at equal threads, from an image folder and from shards.

Every contender reads the same training images from a warm page cache, takes a random crop, flips, resizes and
normalises. torchvision's way is ImageFolder with a DataLoader, as its own training script has it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from data import Batch, DataConfig, DataError, Loader, build_loaders
from data.batch import MEAN_RGB, STD_RGB
from data.images import list_splits
from data.prepare import prepare_shards
from launch.benches.measure import machine, rounds_in_turn, summary, with_spread, write_result
from train.cli import positive_int
from train.world import World, open_world

IMAGES_PER_SHARD = 200
OURS = (
    ("DALI, folder", "folder", "dali"),
    ("DALI, shards", "shards", "dali"),
    ("our folder loader", "folder", "folder"),
)


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
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        shards = Path(folder) / "shards"
        prepare_shards(options.data, shards, images_per_shard=IMAGES_PER_SHARD)
        contenders: dict[str, Callable[[], float]] = {}
        for threads in options.threads:
            for name, path, kind in OURS:
                train = _ours(options, shards if path == "shards" else options.data, kind, threads, world, opened)
                contenders[f"{name}, {threads} thread(s)"] = partial(_images_per_s, train, options, world)
            torchvisions = _TorchvisionLoader(options, threads, world)
            contenders[f"torchvision, {threads} worker(s)"] = partial(_images_per_s, torchvisions, options, world)
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


def _ours(options: argparse.Namespace, path: Path, kind: str, threads: int, world: World, opened: ExitStack) -> Loader:
    """One of this project's training loaders; on a GPU its batches arrive there, and DALI decodes there."""
    config = DataConfig(
        path=str(path),
        loader=kind,
        threads=threads,
        batch_size=options.batch_size,
        image_size=options.image_size,
        resize_size=options.image_size,
    )
    train, val = build_loaders(config, rank=0, world_size=1, device=world.device, seed=0)
    opened.callback(train.close)
    opened.callback(val.close)
    least = 2 * _skipped_steps(options)
    if len(train) < least:
        raise DataError(
            f"{path}: {train.num_images} images make {len(train)} batches of {options.batch_size}, too few to measure, "
            f"at least {least} are needed: take more images or a smaller --batch-size"
        )
    return train


class _TorchvisionLoader:
    """ImageFolder and DataLoader as in torchvision's own training script; on a GPU its batches arrive there, too."""

    def __init__(self, options: argparse.Namespace, workers: int, world: World) -> None:
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(options.image_size, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN_RGB, STD_RGB),
            ]
        )
        self._device = world.device
        self._loader = DataLoader(
            ImageFolder(options.data / "train", transform),
            options.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=world.device.type == "cuda",
            persistent_workers=True,
            multiprocessing_context="forkserver",  # DALI has threads here, and a fork of them can hang
        )

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self._loader:
            on_device = (values.to(self._device, non_blocking=True) for values in (images, labels))
            yield Batch(*on_device, torch.ones(len(images), dtype=torch.bool, device=self._device))


def _skipped_steps(options: argparse.Namespace) -> int:
    """Steps at the start of an epoch that do not count: as many as a DataLoader's workers hold ready ahead of it.

    Until they are through, threads and workers start, and what is taken was made before the clock ran.
    """
    return 2 * max(options.threads)


def _images_per_s(loader: Iterable[Batch], options: argparse.Namespace, world: World) -> float:
    """Images a second of one epoch, the skipped steps left out. Nothing but the loader works."""
    images = 0
    for step, batch in enumerate(loader):
        images += len(batch.labels) if step >= _skipped_steps(options) else 0
        if step == _skipped_steps(options) - 1:
            world.synchronize()
            start = time.perf_counter()
    world.synchronize()
    return images / (time.perf_counter() - start)
