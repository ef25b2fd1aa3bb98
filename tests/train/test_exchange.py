"""The exchange of gradients, in DDP over a group of one process: how often it happens, and the wait for it."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train.loop.config import TrainConfig
from train.loop.step import training_step
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import TrainState
from train.world import World, all_reduce_wait_s, no_sync

CPU = torch.device("cpu")


@pytest.fixture
def parallel() -> Iterator[DistributedDataParallel]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    torch.manual_seed(0)
    try:
        yield DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)))
    finally:
        dist.destroy_process_group()


def exchanges_of(parallel: DistributedDataParallel) -> list[int]:
    """Grows by an entry whenever a bucket of gradients is exchanged."""
    seen: list[int] = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen.append(bucket.index())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    parallel.register_comm_hook(None, hook)
    return seen


def step(parallel: DistributedDataParallel, config: TrainConfig) -> None:
    optimizer = build_optimizer(parallel.module, OptimConfig())
    state = TrainState(parallel.module, parallel, optimizer, Precision("fp32", CPU))
    training_step(state, torch.randn(6, 3, 5, 5), torch.arange(6) % 3, config)


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_step_exchanges_gradients_once_however_many_pieces_it_takes(parallel, pieces: int):
    seen = exchanges_of(parallel)
    step(parallel, TrainConfig(accumulate=pieces))
    assert seen == [0]


def test_what_is_kept_back_goes_with_the_next_exchange(parallel):
    seen, images = exchanges_of(parallel), torch.randn(2, 3, 5, 5)
    with no_sync(parallel):
        parallel(images).sum().backward()
    assert seen == []
    parallel(images).sum().backward()
    assert seen == [0]


def test_the_wait_for_the_exchange_is_known_from_the_second_step_on(parallel):
    step(parallel, TrainConfig())
    assert all_reduce_wait_s(parallel) is None
    for _ in range(2):
        step(parallel, TrainConfig())
    assert 0 <= all_reduce_wait_s(parallel) < 10


def test_one_process_exchanges_nothing():
    model = nn.Linear(2, 2)
    assert all_reduce_wait_s(model) is None
    with no_sync(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


def test_peak_memory_is_that_of_this_process_in_bytes():
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)
    before = world.peak_memory()
    held = torch.ones(80_000_000)  # 320 MB more than there was
    assert 0.25e9 < before < 100e9
    assert world.peak_memory() >= before
    assert held.sum() > 0


def test_what_a_gpu_holds_is_more_than_tensors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    gpu = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cuda", 0))
    assert (gpu.device_memory(), World(0, 1, 0, 1, CPU).device_memory()) == (50, None)
