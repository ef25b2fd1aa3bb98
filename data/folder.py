"""Image folders: the listing that the disk loaders share, and the loader by torchvision and Pillow.

The folder loader is the plain reference that DALI is compared with, and the one that runs everywhere. Worker
processes decode and augment to bytes; normalising happens on the training device.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from data.batch import NORMALISATION, DataConfig, DataError
from data.sharding import Sharding


@dataclass(frozen=True)
class ImageList:
    """The images of one split, class by class in sorted order."""

    root: Path
    names: list[str]
    """CLASS/FILE, relative to the root."""
    labels: np.ndarray
    """int64 (N,), index into `classes`."""
    classes: list[str]

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])  # noqa: PTH118 - called for every image; Path is 10 times slower

    @cached_property
    def digest(self) -> str:
        """Changes when a file is added, removed or renamed; contents are not read."""
        return hashlib.sha256(os.fsencode("\n".join(self.names))).hexdigest()[:16]


def list_splits(path: str | Path) -> tuple[ImageList, ImageList]:
    """Images of PATH/train and PATH/val; DataError if one of them is no image folder or their classes differ."""
    if not Path(path).is_dir():
        raise DataError(
            f"{path}: there is no such folder; expected PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg: "
            "set data.path, or data.prepare to make a data set there"
        )
    train, val = list_images(Path(path) / "train"), list_images(Path(path) / "val")
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        named = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        raise DataError(
            f"{path}: train/ has {len(train.classes)} class folders, val/ {len(val.classes)}, "
            f"and they differ in {named}: both need the same ones"
        )
    return train, val


def list_images(root: Path) -> ImageList:
    """All images under ROOT/CLASS/, class folders and files in sorted order; DataError if there are none.

    Hidden files and folders, and files that are not named as images are left out.
    """
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; expected class folders with images in it")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{root}: found no class folders; expected one folder with images for each class")
    names: list[str] = []
    counts = []
    for class_name in classes:
        files = sorted(entry.name for entry in os.scandir(root / class_name) if _is_image(entry.name))
        if not files:
            raise DataError(
                f"{root / class_name}: found no images ({' '.join(IMG_EXTENSIONS)}); "
                "add some, or remove the folder from train/ and val/"
            )
        names += [f"{class_name}/{name}" for name in files]
        counts.append(len(files))
    return ImageList(root, names, np.repeat(np.arange(len(classes)), counts), classes)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def decode_failure(paths: list[str], cause: Exception) -> DataError:
    """The error to raise when one of these files could not be read: names those that Pillow cannot read either."""
    unreadable = []
    for path in dict.fromkeys(paths):
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:
            unreadable.append(f"{path} ({type(error).__name__}: {' '.join(str(error).split())})")
    if unreadable:
        return DataError(f"cannot read {', '.join(unreadable[:3])}: replace or remove such files, and start again")
    reason = " ".join(str(cause).split())
    return DataError(f"reading failed at one of {len(paths)} images from {paths[0]} to {paths[-1]}: {reason}")


class FolderSource:
    """Images of one split by torchvision's transforms in worker processes.

    Augmentation is seeded by (seed, epoch, index) of each image: it depends neither on the number of workers nor on
    what was read before, so a position is all the state there is.
    """

    def __init__(
        self,
        config: DataConfig,
        images: ImageList,
        *,
        sharding: Sharding,
        augment: bool,
        seed: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._images = images
        self._sharding = sharding
        self._steps = _Steps(sharding)
        self._device = device
        self._normalise = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*NORMALISATION[config.channels])]
        )
        self._loader: DataLoader | None = DataLoader(
            _Images(images, _transform(config, augment), config.channels, seed),
            batch_sampler=self._steps,
            num_workers=workers,
            multiprocessing_context=_worker_context(),
            persistent_workers=True,
            pin_memory=device.type == "cuda",
            # Its own generator: a DataLoader without one draws from the global one at every epoch.
            generator=torch.Generator(),
        )
        self._batches: Any = None

    def start(self, epoch: int, step: int) -> None:
        self._steps.epoch, self._steps.step = self._epoch, self._step = epoch, step
        self._batches = iter(self._loader)

    def next_images(self) -> torch.Tensor:
        try:
            images = next(self._batches)
        except Exception as error:
            indices_B, _ = self._sharding.indices(self._epoch, self._step)
            raise decode_failure([self._images.path(index) for index in indices_B], error) from error
        self._step += 1
        return self._normalise(images.to(self._device, non_blocking=True))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], epoch: int, step: int) -> None:
        pass

    def close(self) -> None:
        # There is no public call. Left to the garbage collector, as after a failure whose traceback holds on to the
        # iterator, the workers end late and one by one after a timeout.
        if self._batches is not None:
            self._batches._shutdown_workers()
        self._batches = self._loader = None


def _worker_context() -> BaseContext:
    """Workers are forked from a clean server process, which has the slow imports behind it.

    Forked from this process, they inherit locks that DALI's, CUDA's or gloo's threads hold at that moment, and hang.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.transforms.v2", "data.folder"])
    return context


def _transform(config: DataConfig, augment: bool) -> v2.Transform:
    """Pillow image -> uint8 (channels, size, size)."""
    if augment:
        crop = v2.RandomResizedCrop(config.image_size, scale=config.crop_scale, ratio=config.crop_ratio, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(config.flip), v2.PILToTensor()])
    resize = v2.Resize(config.resize_size, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(config.image_size), v2.PILToTensor()])


class _Steps:
    """Batch sampler: for each step from a given one to the epoch's end, the (epoch, index) of this rank's images."""

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self.epoch = 0
        self.step = 0

    def __len__(self) -> int:
        return self._sharding.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for step in range(self.step, self._sharding.steps):
            indices_B, _ = self._sharding.indices(epoch, step)
            yield [(epoch, int(index)) for index in indices_B]


class _Images(Dataset):
    """(epoch, index) -> one decoded, augmented image, uint8 (channels, size, size)."""

    def __init__(self, images: ImageList, transform: v2.Transform, channels: int, seed: int) -> None:
        self._images = images
        self._transform = transform
        self._mode = "L" if channels == 1 else "RGB"
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        epoch, index = key
        with Image.open(self._images.path(index)) as image:
            pixels = image.convert(self._mode)
        # torchvision draws from the global generator only; it is put back, as this may be the main process.
        with torch.random.fork_rng(devices=[]):
            sample_seed = np.random.SeedSequence([self._seed, epoch, index]).generate_state(1, np.uint64)
            torch.random.default_generator.manual_seed(int(sample_seed[0]) >> 1)
            return self._transform(pixels)
