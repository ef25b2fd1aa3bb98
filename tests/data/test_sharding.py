"""Validation images counted exactly once, training images at most once an epoch, equally many steps on all ranks."""

import numpy as np
import pytest

from data.batch import DataError
from data.sharding import TrainSharding, ValSharding, local_batch_size

BATCH_SIZE = 3
around_whole_batches = pytest.mark.parametrize(
    ("ranks", "num_images"),
    [(ranks, ranks * BATCH_SIZE * k + more) for ranks in range(1, 9) for k in (1, 2, 5) for more in (-1, 0, 1)],
)


def train(ranks: int, num_images: int, rank: int, seed: int = 7) -> TrainSharding:
    return TrainSharding(num_images=num_images, local_batch_size=BATCH_SIZE, rank=rank, world_size=ranks, seed=seed)


def val(ranks: int, num_images: int, rank: int) -> ValSharding:
    return ValSharding(num_images=num_images, local_batch_size=BATCH_SIZE, rank=rank, world_size=ranks)


def epoch_of(sharding, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All steps of one rank: indices and validity, each (steps * B,)."""
    steps = [sharding.indices(epoch, step) for step in range(sharding.steps)]
    assert all(indices.shape == valid.shape == (BATCH_SIZE,) for indices, valid in steps)
    return tuple(np.concatenate(arrays) for arrays in zip(*steps, strict=True))


@around_whole_batches
def test_validation_counts_every_image_exactly_once(ranks, num_images):
    shards = [val(ranks, num_images, rank) for rank in range(ranks)]
    assert len({shard.steps for shard in shards}) == 1
    assert shards[0].steps == int(np.ceil(num_images / (ranks * BATCH_SIZE)))
    counted = [indices[valid] for indices, valid in map(epoch_of, shards)]
    assert sorted(np.concatenate(counted)) == list(range(num_images))
    padded = [indices[~valid] for indices, valid in map(epoch_of, shards)]
    assert set(np.concatenate(padded)) <= {num_images - 1}


@around_whole_batches
def test_training_takes_every_image_at_most_once_an_epoch(ranks, num_images):
    global_batch = ranks * BATCH_SIZE
    if num_images < global_batch:
        with pytest.raises(DataError, match=f"{num_images} images, fewer than one batch of {global_batch}: lower"):
            train(ranks, num_images, 0)
        return
    shards = [train(ranks, num_images, rank) for rank in range(ranks)]
    assert {shard.steps for shard in shards} == {num_images // global_batch}
    for epoch in (0, 1):
        taken = np.concatenate([epoch_of(shard, epoch)[0] for shard in shards])
        assert len(taken) == len(set(taken)) == num_images // global_batch * global_batch
        assert all(epoch_of(shard, epoch)[1].all() for shard in shards)
        assert set(taken) <= set(range(num_images))


def test_order_depends_on_seed_and_epoch_only():
    orders = {(seed, epoch): tuple(epoch_of(train(1, 60, 0, seed), epoch)[0]) for seed in (7, 8) for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 6
    assert tuple(epoch_of(train(1, 60, 0, 7), 1)[0]) == orders[7, 1]


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    """Step s takes the same images, whether 1 rank takes 6 or 2 ranks take 3 each."""
    one = TrainSharding(num_images=20, local_batch_size=6, rank=0, world_size=1, seed=7)
    two = [train(2, 20, rank) for rank in (0, 1)]
    for step in range(3):
        assert one.indices(4, step)[0].tolist() == np.concatenate([s.indices(4, step)[0] for s in two]).tolist()


def test_images_left_out_of_an_epoch_change():
    left_out = [set(range(5)) - set(epoch_of(train(1, 5, 0), epoch)[0]) for epoch in range(20)]
    assert set.union(*left_out) == set(range(5))


def test_batch_must_divide_among_the_ranks():
    assert local_batch_size(256, 8) == 32
    with pytest.raises(
        DataError, match=r"batch_size: found 10, allowed: a multiple .*\(4\); the nearest ones are 8 and 12"
    ):
        local_batch_size(10, 4)
