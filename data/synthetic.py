"""Made images, without a disk: short tests and measurements of everything but reading.

An image is its class's smooth pattern plus noise, so networks learn it within a few steps.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from data.batch import DataConfig, Split, train_size
from data.images import ImageList
from data.sharding import Sharding

PATTERN_SIZE = 8
NOISES = 32


def synthetic_splits(config: DataConfig) -> tuple[ImageList, ImageList]:
    """The listing of images that no disk holds: the classes in turn; validation has a quarter of training's images."""
    classes = [str(label) for label in range(config.synthetic_classes)]
    splits = []
    for split, count in (("train", config.synthetic_images), ("val", config.synthetic_images // 4)):
        labels = np.arange(count) % len(classes)
        names = [f"{label}/{index}" for index, label in enumerate(labels)]
        splits.append(ImageList(root=Path("synthetic", split), names=names, labels=labels, classes=classes))
    return splits[0], splits[1]


class SyntheticSource:
    """Images that depend only on (seed, split, index), which their listing says, in a part of a split, too.

    Making them costs a few gathers a batch: the noise of an image is the sum of two out of a bank of `NOISES` images,
    drawn for each image of the split.
    """

    def __init__(
        self,
        config: DataConfig,
        images: ImageList,
        *,
        split: Split,
        sharding: Sharding,
        seed: int,
        device: torch.device,
    ) -> None:
        self._labels_N = images.labels
        self._sharding = sharding
        self._device = device
        self._config = config
        self._training = split == "train"
        # Drawn on the CPU, so that every device sees the same images; the patterns are the same in both splits.
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(
            config.synthetic_classes, config.channels, PATTERN_SIZE, PATTERN_SIZE, generator=generator
        )
        noises = torch.randn(NOISES, config.channels, config.image_size, config.image_size, generator=generator)
        self._patterns, self._noises = (
            images.to(device, memory_format=torch.channels_last) for images in (patterns, noises / 2**0.5)
        )
        split_number = ("train", "val").index(images.root.name)
        numbers_N = np.array([int(name.partition("/")[2]) for name in images.names])
        pairs = np.random.Generator(np.random.PCG64([seed, split_number])).integers(
            NOISES, size=(numbers_N.max() + 1, 2)
        )
        self._noise_pairs_N2 = pairs[numbers_N]

    def start(self, epoch: int, step: int) -> None:
        self._epoch, self._step = epoch, step

    def next_images(self) -> torch.Tensor:
        indices_B, _ = self._sharding.indices(self._epoch, self._step)
        size = train_size(self._config, self._epoch) if self._training else self._config.image_size
        self._step += 1
        labels = torch.from_numpy(self._labels_N[indices_B]).to(self._device)
        first, second = torch.from_numpy(self._noise_pairs_N2[indices_B].T.copy()).to(self._device)
        pattern = functional.interpolate(self._patterns[labels], size=size, mode="bilinear", align_corners=False)
        noises = self._noises[..., :size, :size]
        return pattern + noises[first] + noises[second]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], epoch: int, step: int) -> None:
        pass

    def close(self) -> None:
        pass
