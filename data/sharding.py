"""Which image is read by which rank at which step: pure arithmetic, the same on every rank and for every loader."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.batch import DataError

SHARDS_AT_A_TIME = 16
"""Shards that are read together and mixed with each other: enough for a shuffle, as each is a random part of the set,
and few enough that a step's reads lie close together."""

# Shape suffixes: _B = images a step and rank, _N = images of the whole split.


def local_batch_size(batch_size: int, world_size: int) -> int:
    """Images a step of one rank, from those of all ranks together; DataError if they cannot be shared equally."""
    if batch_size % world_size:
        fit = batch_size // world_size * world_size or world_size
        raise DataError(
            f"batch_size: found {batch_size}, allowed: a multiple of the number of ranks ({world_size}); "
            f"the nearest ones are {fit} and {fit + world_size}"
        )
    return batch_size // world_size


@dataclass(frozen=True, kw_only=True)
class TrainSharding:
    """Training: an epoch's order is a permutation by (seed, epoch), dealt out step by step, rank by rank.

    The images that do not fill a global batch are left out of an epoch; as the order is new every epoch, they are
    others each time. DataError if not even one global batch can be filled.
    """

    num_images: int
    local_batch_size: int
    """Images a step of one rank."""
    rank: int
    world_size: int
    seed: int
    """Equal on all ranks."""
    shard_sizes: tuple[int, ...] = ()
    """Images of each shard, where the images lie in shards: the order then keeps to a few shards at a time."""

    def __post_init__(self) -> None:
        if self.steps == 0:
            raise DataError(
                f"the training set has {self.num_images} images, fewer than one batch of "
                f"{self.local_batch_size * self.world_size}: lower batch_size to at most {self.num_images}, "
                "or add images"
            )

    @property
    def steps(self) -> int:
        """Steps of an epoch, equal on all ranks."""
        return self.num_images // (self.local_batch_size * self.world_size)

    def stream_step(self, epoch: int, step: int) -> int:
        """Place in the endless stream of steps; two places are equal where they give the same batch."""
        return epoch * self.steps + step

    def indices(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's images of one step: indices int64 (B,), valid bool (B,), here all True."""
        first = (step * self.world_size + self.rank) * self.local_batch_size
        order_N = _permutation(self.num_images, self.shard_sizes, self.seed, epoch)
        return order_N[first : first + self.local_batch_size], np.ones(self.local_batch_size, dtype=bool)


@dataclass(frozen=True, kw_only=True)
class ValSharding:
    """Validation: every image once, in sorted order, every epoch the same.

    Where the last steps cannot be filled, the last image is repeated with valid = False, so that all ranks take
    equally many steps of equally many images.
    """

    num_images: int
    local_batch_size: int
    """Images a step of one rank."""
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps of an epoch, equal on all ranks."""
        return -(-self.num_images // (self.local_batch_size * self.world_size))

    def stream_step(self, epoch: int, step: int) -> int:
        """Place in the endless stream of steps; the epoch makes no difference here."""
        return step

    def indices(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's images of one step: indices int64 (B,), valid bool (B,), False = padding."""
        first = (step * self.world_size + self.rank) * self.local_batch_size
        positions_B = np.arange(first, first + self.local_batch_size)
        return np.minimum(positions_B, self.num_images - 1), positions_B < self.num_images


Sharding = TrainSharding | ValSharding


# Prefetching reads across the end of an epoch, so two orders are in use at a time; they are shared, hence read-only.
@lru_cache(maxsize=2)
def _permutation(num_images: int, shard_sizes: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    if not shard_sizes:
        order_N = generator.permutation(num_images)
    else:
        shards = np.split(np.arange(num_images), np.cumsum(shard_sizes)[:-1])
        turns = generator.permutation(len(shards))
        windows = [turns[first : first + SHARDS_AT_A_TIME] for first in range(0, len(turns), SHARDS_AT_A_TIME)]
        mixed = [generator.permutation(np.concatenate([shards[s] for s in window])) for window in windows]
        order_N = np.concatenate(mixed)
    order_N.flags.writeable = False
    return order_N
