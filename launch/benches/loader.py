"""Images a second: DALI beside torchvision's DataLoader at equal threads, from an image folder and from shards.

Every contender reads the same training images from a warm page cache, takes a random crop, flips, resizes and
normalises, and hands it over on the device. torchvision's way is ImageFolder with a DataLoader, as its own training
script has it. With --network a network is trained on the batches, too, and the share of the time that it waits for them
is measured: what counts on a GPU.
"""

import argparse
import itertools
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

from data import Batch, DataError, Loader, build_loaders
from data.batch import MEAN_RGB, STD_RGB
from data.images import list_splits
from data.prepare import Smaller, prepare_shards
from launch.benches.measure import (
    data_config,
    machine,
    require_image_folder,
    rounds_in_turn,
    summary,
    with_spread,
    write_result,
)
from train.cli import positive_int
from train.network.models import build_model
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.world import World, open_world

IMAGES_PER_SHARD = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="image folder (train/, val/)")
    parser.add_argument("--rounds", type=positive_int, default=10, metavar="N", help="after a warm-up (default: 10)")
    parser.add_argument(
        "--threads", type=positive_int, nargs="+", default=[1, 2, 4], metavar="N", help="default: 1 2 4"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--image-size", type=positive_int, default=224, metavar="PIXELS", help="default: 224")
    parser.add_argument(
        "--short-side", type=positive_int, metavar="PIXELS", help="also from shards whose images were made so large"
    )
    parser.add_argument("--network", metavar="NAME", help="also train it (resnet50) and measure how long it waits")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")


def measure(options: argparse.Namespace) -> None:
    """Measure, print the table, write the result."""
    require_image_folder(options.data)
    world = open_world(options.device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        ours = _contenders(options, Path(folder))
        loaders: dict[str, Iterable[Batch]] = {}
        for threads in options.threads:
            for name, (path, kind) in ours.items():
                loaders[f"{name}, {threads} thread(s)"] = _ours(options, path, kind, threads, world, opened)
            loaders[f"torchvision, {threads} worker(s)"] = _TorchvisionLoader(options, threads, world)
        rates = {name: partial(_images_per_s, loader, options, world) for name, loader in loaders.items()}
        results = {"images_per_s": rounds_in_turn(rates, options.rounds)}
        if options.network:
            step = _training_step(options, world)
            waits = {name: partial(_wait_share, loader, step, options, world) for name, loader in loaders.items()}
            results["wait_share"] = rounds_in_turn(waits, options.rounds)
    what = f"{options.image_size} pixels, batches of {options.batch_size}, {world.device.type}"
    units = {"images_per_s": "images/s", "wait_share": f"share of {options.network}'s training spent waiting for data"}
    for measured, of_loader in results.items():
        print(f"{what}: {units[measured]}, median (spread)")
        for name, values in of_loader.items():
            print(f"  {name:<36} {with_spread(values, digits=0 if measured == 'images_per_s' else 3)}")
    if options.out:
        content = {
            "benchmark": f"loader, {what}",
            "machine": machine("torchvision", "nvidia-dali-cuda130", "Pillow"),
            "network": options.network,
            **{m: {name: summary(values) for name, values in of.items()} for m, of in results.items()},
        }
        write_result(options.out, content)


def _contenders(options: argparse.Namespace, folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> data set and data.loader; shards are written to the folder."""
    shards = folder / "shards"
    prepare_shards(options.data, shards, images_per_shard=IMAGES_PER_SHARD)
    contenders = {
        "DALI, folder": (options.data, "dali"),
        "DALI, shards": (shards, "dali"),
        "our folder loader": (options.data, "folder"),
    }
    if options.short_side:
        smaller = folder / "smaller"
        prepare_shards(options.data, smaller, images_per_shard=IMAGES_PER_SHARD, smaller=Smaller(options.short_side))
        contenders[f"DALI, shards of {options.short_side} pixels"] = (smaller, "dali")
    return contenders


def _ours(options: argparse.Namespace, path: Path, kind: str, threads: int, world: World, opened: ExitStack) -> Loader:
    """One of this project's training loaders; on a GPU its batches arrive there, and DALI decodes there."""
    config = data_config(
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


def _training_step(options: argparse.Namespace, world: World) -> Callable[[Batch], None]:
    """One training step of the network on this device, in bf16 on a GPU."""
    num_classes = len(list_splits(options.data)[0].classes)
    model = build_model(options.network, num_classes).to(world.device, memory_format=MEMORY_FORMAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    precision = Precision("bf16" if world.device.type == "cuda" else "fp32", world.device)

    def step(batch: Batch) -> None:
        with precision.autocast():
            logits = model(batch.images.contiguous(memory_format=MEMORY_FORMAT))
            loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _wait_share(
    loader: Iterable[Batch], step: Callable[[Batch], None], options: argparse.Namespace, world: World
) -> float:
    """Share of an epoch in which the device has nothing to do until the next batch has arrived on it.

    The device has finished a step before the clock of the next wait starts; loaders prefetch all the while.
    """
    waited = total = 0.0
    batches = iter(loader)
    for number in itertools.count():
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return waited / total
        world.synchronize()
        arrived = time.perf_counter()
        step(batch)
        world.synchronize()
        if number >= _skipped_steps(options):
            waited += arrived - asked
            total += time.perf_counter() - asked
