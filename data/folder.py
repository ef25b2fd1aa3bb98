"""Images through torchvision and Pillow: the plain reference that DALI is compared with; it runs everywhere.

Worker processes decode and augment to bytes; normalising happens on the training device.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from functools import cache, partial
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from data.batch import FILL, DataConfig, Split, train_size
from data.defects import decode_failure
from data.images import ImageList, open_image
from data.sharding import Sharding


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
        split: Split,
        sharding: Sharding,
        seed: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._images = images
        self._sharding = sharding
        self._steps = _Steps(sharding)
        self._device = device
        self._mean, self._std = config.mean, config.std
        self._loader: DataLoader | None = DataLoader(
            _Images(config, images, split, seed),
            batch_sampler=self._steps,
            num_workers=workers,
            multiprocessing_context=_worker_context(),
            persistent_workers=True,
            worker_init_fn=_live_as_long_as_the_rank,
            pin_memory=device.type == "cuda",
            # Its own generator: a DataLoader without one draws from the global one at every epoch.
            generator=torch.Generator(),
        )
        self._batches: Any = None
        # A process waits for its workers at its end, and these do not heed SIGTERM. Registered later than torch's own
        # function, which takes the workers' end out of its hands, it is called before that one.
        self._at_exit = partial(_close, weakref.ref(self))

    def start(self, epoch: int, step: int) -> None:
        self._steps.epoch, self._steps.step = self._epoch, self._step = epoch, step
        if self._batches is None:
            atexit.register(self._at_exit)
        self._batches = iter(self._loader)

    def next_images(self) -> torch.Tensor:
        try:
            images = next(self._batches)
        except Exception as error:
            indices_B, _ = self._sharding.indices(self._epoch, self._step)
            raise decode_failure(self._images, indices_B, error) from error
        self._step += 1
        return _normalised(images.to(self._device, non_blocking=True), self._mean, self._std)

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
        atexit.unregister(self._at_exit)


def _close(source: "weakref.ref[FolderSource]") -> None:
    if (left_open := source()) is not None:
        left_open.close()


def _normalised(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (B, height, width, channels) -> float32 (B, channels, height, width), channels-last."""
    _, height, width, channels = images.shape
    # A row of pixels at a time: broadcast over three channels, the same arithmetic takes several times as long.
    rows = v2.functional.to_dtype(images.view(-1, height, width * channels), torch.float32, scale=True)
    mean_of_row, std_of_row = (torch.tensor(values, device=rows.device).repeat(width) for values in (mean, std))
    return rows.sub_(mean_of_row).div_(std_of_row).view(images.shape).permute(0, 3, 1, 2)


def _worker_context() -> BaseContext:
    """Workers are forked from a clean server process, which has the slow imports behind it.

    Forked from this process, they inherit locks that DALI's, CUDA's or gloo's threads hold at that moment, and hang.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.transforms.v2", "data.folder"])
    return context


def _live_as_long_as_the_rank(worker: int) -> None:
    """Ctrl-C and torchrun signal all processes, and training still wants the batches of its last step from this one.

    It ends with the process that it works for, however that ends. Torch looks whether its parent is gone, but that is
    the server, which in turn stays as long as a worker does: both would keep the pipes of a rank that was killed.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_rank, name="end with the rank", daemon=True).start()


def _end_with_the_rank() -> None:
    multiprocessing.parent_process().join()  # which watches the process itself, not the server
    os._exit(1)


@cache
def _train_transform(config: DataConfig, size: int) -> v2.Transform:
    """Pillow image -> Pillow image of that size, augmented."""
    steps = [
        v2.RandomResizedCrop(
            size,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            interpolation=v2.InterpolationMode(config.interpolation),
            antialias=True,
        ),
        v2.RandomHorizontalFlip(config.flip),
    ]
    if config.auto_augment == "randaugment":
        steps.append(v2.RandAugment(config.randaugment_ops, config.randaugment_magnitude, fill=FILL))
    elif config.auto_augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(fill=FILL))
    if any(config.color_jitter):
        steps.append(v2.ColorJitter(*config.color_jitter))
    return v2.Compose(steps)


@cache
def _val_transform(config: DataConfig) -> v2.Transform:
    """Pillow image -> its centre, a Pillow image of image_size."""
    side, interpolation = config.resize_size, v2.InterpolationMode(config.interpolation)
    if config.resized_side == "longer":
        fill = [round(255 * value) for value in config.mean]
        return v2.Compose([_ResizeLonger(side, interpolation), _CenterWithBorder(config.image_size, fill)])
    size = [side, side] if config.resized_side == "both" else [side]
    return v2.Compose([v2.Resize(size, interpolation, antialias=True), v2.CenterCrop(config.image_size)])


class _ResizeLonger(v2.Transform):
    """Pillow image -> Pillow image whose longer side is `side`, rounded as timm does."""

    def __init__(self, side: int, interpolation: v2.InterpolationMode) -> None:
        super().__init__()
        self._side, self._interpolation = side, interpolation

    def forward(self, image: Image.Image) -> Image.Image:
        ratio = max(image.height / self._side, image.width / self._side)
        size = [round(image.height / ratio), round(image.width / ratio)]
        return v2.functional.resize(image, size, self._interpolation, antialias=True)


class _CenterWithBorder(v2.Transform):
    """Pillow image -> its centre, a Pillow image of `side`, with a border of colour `fill` where it is smaller."""

    def __init__(self, side: int, fill: list[int]) -> None:
        super().__init__()
        self._side, self._fill = side, fill

    def forward(self, image: Image.Image) -> Image.Image:
        across, down = (max(0, self._side - size) for size in image.size)
        border = [across // 2, down // 2, (across + 1) // 2, (down + 1) // 2]
        return v2.functional.center_crop(v2.functional.pad(image, border, fill=self._fill), [self._side] * 2)


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
    """(epoch, index) -> one decoded, augmented image, uint8 (size, size, channels)."""

    def __init__(self, config: DataConfig, images: ImageList, split: Split, seed: int) -> None:
        self._config = config
        self._images = images
        self._training = split == "train"
        self._mode = "L" if config.channels == 1 else "RGB"
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        epoch, index = key
        pixels = open_image(self._images.read(index), self._mode)
        if not self._training:
            return _as_tensor(_val_transform(self._config)(pixels))
        # torchvision draws from the global generator only, which here is a worker's own.
        sample_seed = np.random.SeedSequence([self._seed, epoch, index]).generate_state(1, np.uint64)
        torch.random.default_generator.manual_seed(int(sample_seed[0]) >> 1)
        return _as_tensor(_train_transform(self._config, train_size(self._config, epoch))(pixels))


def _as_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 (height, width, channels), as Pillow stores it."""
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1)
