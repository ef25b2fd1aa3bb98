"""Made images, without a disk: short tests and measurements of everything but reading.

An image is its class's smooth pattern plus noise, so networks learn it within a few steps.
"""

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from data.batch import DataConfig
from data.sharding import Sharding

PATTERN_SIZE = 8
NOISES = 32


def synthetic_labels(num_images: int, num_classes: int) -> np.ndarray:
    """int64 (N,): the classes in turn."""
    return np.arange(num_images) % num_classes


class SyntheticSource:
    """Images that depend only on (seed, split, index).

    Making them costs a few gathers a batch: the noise of an image is the sum of two out of a bank of `NOISES` images,
    drawn for each image of the split.
    """

    def __init__(
        self,
        config: DataConfig,
        labels: np.ndarray,
        *,
        sharding: Sharding,
        split: str,
        seed: int,
        device: torch.device,
    ) -> None:
        self._labels_N = labels
        self._sharding = sharding
        self._device = device
        self._image_size = config.image_size
        # Drawn on the CPU, so that every device sees the same images; the patterns are the same in both splits.
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(
            config.synthetic_classes, config.channels, PATTERN_SIZE, PATTERN_SIZE, generator=generator
        )
        noises = torch.randn(NOISES, config.channels, config.image_size, config.image_size, generator=generator)
        self._patterns, self._noises = patterns.to(device), (noises / 2**0.5).to(device)
        split_number = ("train", "val").index(split)
        self._noise_pairs_N2 = np.random.Generator(np.random.PCG64([seed, split_number])).integers(
            NOISES, size=(len(labels), 2)
        )

    def start(self, epoch: int, step: int) -> None:
        self._epoch, self._step = epoch, step

    def next_images(self) -> torch.Tensor:
        indices_B, _ = self._sharding.indices(self._epoch, self._step)
        self._step += 1
        labels = torch.from_numpy(self._labels_N[indices_B]).to(self._device)
        first, second = torch.from_numpy(self._noise_pairs_N2[indices_B].T.copy()).to(self._device)
        pattern = functional.interpolate(
            self._patterns[labels], size=self._image_size, mode="bilinear", align_corners=False
        )
        return pattern + self._noises[first] + self._noises[second]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], epoch: int, step: int) -> None:
        pass

    def close(self) -> None:
        pass
