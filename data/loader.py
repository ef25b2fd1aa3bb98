"""The one implementation of the `Loader` contract: position, labels, validity and state around a source of images.

The loaders differ only in where their images come from. Labels and validity are computed here, from the same
arithmetic that the source follows, so they are the same with every loader.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from data.batch import Batch, DataError
from data.images import ImageList
from data.sharding import Sharding

T = TypeVar("T")


class ImageSource(Protocol):
    """One split's images of one rank, step after step without end, across the epochs."""

    def start(self, epoch: int, step: int) -> None:
        """Make `next_images` give this step's images next; costs nothing where it would do so anyway."""

    def next_images(self) -> torch.Tensor:
        """Images of the next step as in `Batch`, on the loader's device."""

    def state_dict(self) -> dict[str, Any]:
        """What epoch and step do not say, such as the state of random generators; plain data."""

    def load_state_dict(self, state: dict[str, Any], epoch: int, step: int) -> None:
        """Go on from a `state_dict` that was taken at this epoch and step."""

    def close(self) -> None:
        """End threads and worker processes."""


class SplitLoader:
    """A `Loader` of one split on one rank; see data/batch.py for the contract.

    identity: what must be equal for a stored state to be continued, such as seed, rank and options; plain data.
    """

    def __init__(
        self,
        kind: str,
        source: ImageSource,
        images: ImageList,
        *,
        sharding: Sharding,
        device: torch.device,
        identity: dict[str, int | float | str],
    ) -> None:
        self.kind = kind
        self.num_classes = len(images.classes)
        self.classes = None if kind == "synthetic" else tuple(images.classes)
        self.num_images = len(images.names)
        self.num_excluded = images.num_excluded
        self.unmatched = images.unmatched
        self.passed_over = images.passed_over
        self.waiting_since: float | None = None
        self._source = source
        self._sharding = sharding
        self._labels_N = images.labels
        self._device = device
        self._identity = identity
        self._epoch = 0
        self._step = 0

    def __len__(self) -> int:
        return self._sharding.steps

    def go_to(self, epoch: int, step: int = 0) -> None:
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch; without a `go_to` the next iteration takes the epoch after it."""
        if self._step < len(self):
            self._awaited(lambda: self._source.start(self._epoch, self._step))
        while self._step < len(self):
            indices_B, valid_B = self._sharding.indices(self._epoch, self._step)
            images = self._awaited(self._source.next_images)
            # Counted before the batch is handed out, so that a state taken during a step goes on after it.
            self._step += 1
            yield Batch(images, self._on_device(self._labels_N[indices_B]), self._on_device(valid_B))
        self._epoch, self._step = self._epoch + 1, 0

    def _awaited(self, action: Callable[[], T]) -> T:
        self.waiting_since = time.monotonic()
        try:
            return action()
        finally:
            self.waiting_since = None

    def _on_device(self, values_B: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values_B)
        if self._device.type == "cuda":
            # From pageable memory the copy would wait for everything that the GPU still has to do.
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity, "epoch": self._epoch, "step": self._step, **self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        differences = [
            f"{name}: stored {state.get(name)!r}, now {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if differences:
            raise DataError(
                "the stored loader state belongs to other data or options ("
                + "; ".join(differences)
                + "): resume with the stored ones, or start at an epoch's first step without the loader state"
            )
        self._epoch, self._step = state["epoch"], state["step"]
        self._source.load_state_dict(state, self._epoch, self._step)

    def same_images(self, state: dict[str, Any]) -> bool:
        return state.get("file_names") == self._identity["file_names"]

    def close(self) -> None:
        self._awaited(self._source.close)
