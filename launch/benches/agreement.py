"""Whether DALI and torchvision see the same validation images: their pixels, and a network's top-1 through both.

torchvision's way is ImageFolder with Resize and CenterCrop, as its own training script has it, without a line of this
project's loaders.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from data import Batch, DataConfig, DataError, Loader, build_loaders
from data.batch import preprocessing_of
from launch.benches.measure import data_config, machine, require_image_folder, write_result
from train.checkpoint.network import StoredNetwork, load_network
from train.cli import positive_int
from train.config import config_from_dict
from train.errors import TrainError
from train.loop.evaluation import evaluate
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT
from train.world import open_world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="image folder (train/, val/)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="of a run: top-1, at that run's image sizes")
    parser.add_argument(
        "--resize-size", type=positive_int, metavar="PIXELS", help="of the shorter side; the run's, or 256"
    )
    parser.add_argument("--batch-size", type=positive_int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = GPU if any")


def measure(options: argparse.Namespace) -> None:
    """Measure, print the numbers, write the result."""
    world = open_world(options.device)
    stored = load_network(options.checkpoint) if options.checkpoint else None
    config = _config(options, stored)
    require_image_folder(options.data)
    loaders = {
        "DALI": _validation(config, "dali", world.device),
        "our folder loader": _validation(config, "folder", world.device),
        "torchvision": _TorchvisionLoader(config, world.device),
    }
    reference = loaders["torchvision"]
    if stored is not None and stored.architecture.num_classes != loaders["DALI"].num_classes:
        found = loaders["DALI"].num_classes
        raise TrainError(f"{options.data} has {found} classes, the network {stored.architecture.num_classes}")
    rows = []
    print(f"{reference.num_images} validation images of {config.image_size} pixels, {world.device.type}")
    for name, loader in loaders.items():
        mean, worst = pixel_difference(loader, reference, config.std)
        row = {"name": name, "mean_difference": mean, "worst_image": worst}
        line = f"  {name:<20} pixels {mean:.3f} of 255 from torchvision's, in the worst image {worst:.3f}"
        if stored is not None:
            stored.model.to(world.device, memory_format=MEMORY_FORMAT)
            result = evaluate(stored.model, loader, Precision("fp32", world.device), world)
            row |= {"top1": result.top1, "top5": result.top5, "images": result.images}
            line += f"; top-1 {result.top1:.2f}%, top-5 {result.top5:.2f}%"
        rows.append(row)
        print(line, flush=True)
    for loader in loaders.values():
        loader.close()
    if options.out:
        content = {
            "benchmark": f"agreement, {config.image_size} of {config.resize_size} pixels, {world.device.type}",
            "machine": machine("torchvision", "nvidia-dali-cuda130", "Pillow"),
            "network": stored.architecture.name if stored else None,
            "rows": rows,
        }
        write_result(options.out, content)


def pixel_difference(loader: Loader, reference: Loader, std: Sequence[float]) -> tuple[float, float]:
    """Mean absolute difference of the validation pixels, of 255, and that of the image that differs most.

    std: what the pixels were divided by, of each channel. Raises DataError where the two do not have the same images in
    the same order.
    """
    std_C11 = torch.tensor(std).view(-1, 1, 1)
    differences = []
    for ours, theirs in zip(loader, reference, strict=True):
        labels = ours.labels[ours.valid]
        if not torch.equal(labels, theirs.labels[theirs.valid]):
            raise DataError("the two loaders' labels differ: is there an exclude list, or a folder within a class?")
        distance = (ours.images[ours.valid] - theirs.images[theirs.valid]).abs().cpu() * std_C11 * 255
        differences.append(distance.mean(dim=(1, 2, 3)))
    of_image_N = torch.cat(differences)
    return of_image_N.mean().item(), of_image_N.max().item()


def _config(options: argparse.Namespace, stored: StoredNetwork | None) -> DataConfig:
    """Sizes are those of the run that trained the network; ImageNet's usual ones without a network."""
    if stored is None:
        sizes: dict[str, Any] = {}
    elif stored.config is None:
        raise TrainError(f"{options.checkpoint}: no run trained it, so nobody knows its image sizes: give a run's own")
    else:
        data = config_from_dict(stored.config).data
        sizes = {"channels": data.channels, **vars(preprocessing_of(data, stored.preprocessing).validation)}
    if options.resize_size is not None:
        sizes["resize_size"] = options.resize_size
    return data_config(path=str(options.data), batch_size=options.batch_size, **sizes)


def _validation(config: DataConfig, kind: str, device: torch.device) -> Loader:
    config = dataclasses.replace(config, loader=kind)
    [val] = build_loaders(config, rank=0, world_size=1, device=device, seed=0, splits=("val",))
    return val


class _TorchvisionLoader:
    """The validation images in torchvision's own way."""

    def __init__(self, config: DataConfig, device: torch.device) -> None:
        to_mode = [v2.Grayscale()] if config.channels == 1 else []
        transform = v2.Compose(
            [
                v2.Resize(config.resize_size, v2.InterpolationMode(config.interpolation), antialias=True),
                v2.CenterCrop(config.image_size),
                *to_mode,
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config.mean, config.std),
            ]
        )
        images = ImageFolder(Path(config.path) / "val", transform)
        self.num_images, self.num_classes = len(images), len(images.classes)
        self._device = device
        self._loader = DataLoader(images, config.batch_size)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self._loader:
            valid = torch.ones(len(images), dtype=torch.bool, device=self._device)
            yield Batch(images.to(self._device), labels.to(self._device), valid)

    def close(self) -> None:
        """There is nothing to end."""
