"""Ranks and devices. The only file that touches torch.distributed and DDP; one process needs no group.

Decisions are made on rank 0 and broadcast as plain data. A step that can fail runs through `on_every_rank` or
`on_rank_zero`, so that a failure on one rank is an error on all of them and no rank waits in a collective for ever.
"""

import inspect
import io
import json
import os
import resource
import secrets
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cup import CupError
from data import DataError
from train.allocation import keep_freed_memory
from train.errors import ConfigError, TrainError

T = TypeVar("T")

USER_ERRORS = (TrainError, DataError, CupError)
"""What a user can cause; everything else is a bug and keeps its traceback."""

COLLECTIVE_TIMEOUT_MINUTES = 10.0
FAILURE_KEY = "failure"
"""Key of the store under which the first rank that fails leaves its error."""
STORE_ANSWERS_WITHIN_S = 3.0


@dataclass(frozen=True)
class World:
    """This process among all of them: rank 0..size-1, its number on this machine, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (what JSON can hold) on every rank. All ranks call it."""
        if self.size == 1:
            return json.loads(json.dumps(value))  # what JSON cannot hold fails with one rank as with many
        # JSON: torch's object collectives would unpickle what arrives.
        return json.loads(self.broadcast_bytes(json.dumps(value).encode() if self.is_main else None))

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's `data` on every rank; what others give does not count. All ranks call it."""
        if self.size == 1:
            return data
        tensor = _to_bytes(data) if self.is_main else None
        length = torch.tensor([0 if tensor is None else len(tensor)])
        dist.broadcast(length, src=0)
        tensor = torch.empty(length.item(), dtype=torch.uint8) if tensor is None else tensor
        dist.broadcast(tensor, src=0)
        return tensor.numpy().tobytes()

    def all_gather(self, value: T) -> list[T]:
        """Every rank's `value` (plain data or CPU tensors), in rank order, on all ranks. All ranks call it."""
        if self.size == 1:
            return [value]
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = _to_bytes(buffer.getvalue())
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        longest = int(max(lengths))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, F.pad(data, (0, longest - len(data))))
        received = (part[:length].numpy().tobytes() for part, length in zip(parts, lengths, strict=True))
        return [torch.load(io.BytesIO(content), weights_only=True) for content in received]  # runs no code

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place, and return it. All ranks call it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, values: list[int]) -> list[int]:
        """The elementwise maximum of all ranks' `values`; works on the CPU and waits for no GPU. All ranks call it."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def on_every_rank(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return this rank's result. All ranks call it.

        If it fails on some rank, every rank raises: the failing one its own exception, the others a RankFailed that
        says which rank failed and why.
        """
        error = None
        try:
            result = action()
        except Exception as caught:  # whatever it is, the others must hear of it before it goes on
            error = caught
        failure = None if error is None else (str(error) or type(error).__name__, getattr(error, "exit_code", 1))
        failures = self.all_gather(failure)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise RankFailed(rank, *failure)
        return result

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result (what JSON can hold) everywhere. All ranks call it.

        If it fails, every rank raises as in `on_every_rank`.
        """
        return self.broadcast(self.on_every_rank(action if self.is_main else lambda: None))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model in DDP, or the model itself where there is one process. All ranks call it.

        The ranks' weights must be equal already: digests are compared first, and nothing is overwritten here.
        """
        if self.size == 1:
            return model
        # Buffers are averaged once an epoch instead, see average_buffers. torch 2.15 gave the switch another name.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        buffer_switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            init_sync=False,
            **{buffer_switch: False},
        )

    def average_buffers(self, model: nn.Module) -> None:
        """Average the floating-point buffers (batch-norm statistics) over all ranks, in place. All ranks call it."""
        if self.size == 1:
            return
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if buffers:
            means = self.all_reduce(torch.cat([buffer.flatten() for buffer in buffers])) / self.size
            for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))

    def peak_memory(self) -> int:
        """Bytes at the highest: of tensors on the GPU since the last call, else of this process since it began."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        kilobyte = 1 if sys.platform == "darwin" else 1024  # the unit in which the system counts
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte

    def device_memory(self) -> int | None:
        """Bytes of this rank's GPU that are in use now, whoever holds them; None on a CPU.

        Tensors and what the allocator keeps for the next ones, DALI, NCCL, CUDA itself, other processes.
        """
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read now means what it says."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class RankFailed(TrainError):
    """Another rank failed; its own message says the same with more around it."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"rank {rank} failed: {message}")
        self.exit_code = exit_code


def open_world(device: str = "auto", timeout_minutes: float = COLLECTIVE_TIMEOUT_MINUTES) -> World:
    """Join the process group that torchrun's variables describe, or stand alone without them.

    device: auto (a GPU if there is one), cpu or cuda. nccl moves GPU tensors, gloo everything else. On a CPU the
        process keeps what it frees from here on (`keep_freed_memory`).
    timeout_minutes: a rank that waits longer than this for the others in a collective gives up.
    Raises ConfigError if cuda is asked for and there is none, or fewer GPUs than ranks on this machine; TrainError if
    the other ranks cannot be reached.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank, local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("run.device: found cuda, but torch sees no GPU here; allowed: auto, cpu")
        if local_size > torch.cuda.device_count():
            raise ConfigError(
                f"{local_size} ranks on this machine, but {torch.cuda.device_count()} GPUs: start torchrun with "
                "--nproc-per-node at most the number of GPUs, or set --run.device cpu"
            )
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
    if size > 1:
        timeout = timedelta(minutes=timeout_minutes)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
                store=dist.PrefixStore(_attempt(store, rank, size, timeout), store),
                rank=rank,
                world_size=size,
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:  # the network's are RuntimeErrors, a missing variable a ValueError
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise TrainError(
                f"cannot join the other ranks at {where} (MASTER_ADDR, MASTER_PORT; torchrun's --rdzv-endpoint): "
                f"{_first_line(error)}"
            ) from error
    return World(rank, size, local_rank, local_size, where)


def _attempt(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name for this start of the ranks: equal on all of them, in no earlier start's use. All ranks call it.

    torchrun keeps its store when it starts the ranks again, and torch (2.11, 2.15: `_create_c10d_store`) leaves it at
    that: a rank that comes first reads the addresses of processes that are dead, and waits for them. Counting starts
    does not help, for each node counts its own (pytorch issue 135712). So rank 0 goes on to repeat the names that all
    ranks gave themselves until every one of them has seen its own.

    Raises RuntimeError if a rank does not come within the timeout.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    own, names = secrets.token_hex(8), [f"names/{other}" for other in range(size)]
    store.set(names[rank], own)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(names):
            seen = [name.decode() for name in store.multi_get(names)]
            store.set("names", json.dumps(seen))
            if store.check([f"{own}/{name}" for name in seen[1:]]):
                return own
        elif rank != 0 and store.check(["names"]) and own in (seen := json.loads(store.get("names"))):
            store.set(f"{seen[0]}/{own}", "seen")
            return seen[0]
        time.sleep(max(0.02, size / 500))  # 500 questions a second are no burden for the store
    raise RuntimeError(f"timed out after {timeout} with no word of {'rank 0' if rank else 'all the others'}")


def no_sync(parallel: nn.Module) -> AbstractContextManager:
    """Inside, DDP does not all-reduce gradients; the first backward pass outside reduces all that have accumulated.

    parallel: from `World.wrap`. The forward pass has to be inside as well.
    """
    is_ddp = isinstance(parallel, nn.parallel.DistributedDataParallel)
    return parallel.no_sync() if is_ddp else nullcontext()


def all_reduce_wait_s(parallel: nn.Module) -> float | None:
    """Seconds that a step waits for the all-reduce of gradients with nothing left to compute meanwhile.

    As DDP itself measured it at the last step that it sampled: one of the first ten since `World.wrap`, later every
    hundredth. DDP's own mean includes the first step, in which the ranks compile and wait for each other.
    None for one process, and before the second step.
    """
    if not isinstance(parallel, nn.parallel.DistributedDataParallel):
        return None
    measured = parallel._get_ddp_logging_data()
    if "backward_comm_time" not in measured:
        return None
    return max(0, measured["backward_comm_time"] - measured["backward_compute_comm_overlap_time"]) / 1e9  # from ns


def available_cores() -> int:
    """Cores that this process may use; in containers and under batch systems a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torchrun_job() -> str | None:
    """The name by which torchrun knows this job, the same after its restarts; None without torchrun or a name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name in ("", "none") else name  # torchrun calls a job "none" that was not given --rdzv-id


def announce_failure(error: BaseException) -> None:
    """Leave this rank's error in the store, for the ranks that will lose it. No collective; the first error stays."""
    if not dist.is_initialized():
        return
    message = " ".join(str(error).split()) or type(error).__name__
    leave_word(message if isinstance(error, RankFailed) else f"rank {dist.get_rank()} failed: {message}")


def leave_word(message: str) -> None:
    """Leave in the store why the ranks cannot go on, unless there is a word already. No collective."""
    message = message.encode("utf-8", "backslashreplace").decode()  # a file's name may be no text
    _of_store(lambda store: store.compare_set(FAILURE_KEY, "", message))


def read_word(store: dist.Store) -> str | None:
    """What was left by `leave_word`. Raises RuntimeError where the store is gone."""
    return store.get(FAILURE_KEY).decode() if store.check([FAILURE_KEY]) else None


def open_line() -> dist.Store:
    """A connection of its own to the group's store: a thread that waits on one keeps the others from it."""
    return dist.distributed_c10d._get_default_store().clone()


def abort_group() -> None:
    """Give up what NCCL has in flight, so that who waits for it comes free. May itself wait for ever."""
    with suppress(Exception):  # the group is broken already
        dist.distributed_c10d._abort_process_group()


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error means that another rank is gone or does not answer."""
    signs = ("gloo", "remote worker", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    is_network_s = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return isinstance(error, dist.DistError) or is_network_s


def explain_lost_rank(error: BaseException) -> str | None:
    """What happened to another rank, as a message, if `error` means that one is gone or does not answer; else None.

    The message is that rank's own error where it left one (`announce_failure`).
    """
    if not is_lost_rank(error):
        return None
    announced = _of_store(read_word)
    if announced is not None:
        return announced
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        what = "another rank did not answer in time (run.timeout_minutes): is its machine there, and the network?"
    else:
        what = "lost another rank in the middle of a collective; its own message, if it could leave any, says why"
    return f"{what} ({_first_line(error)})"


def explain_out_of_memory(error: Exception) -> str | None:
    """What to do, as a message, if `error` means that a GPU's memory is full; else None."""
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    return f"not enough GPU memory: lower data.batch_size or raise train.accumulate ({_first_line(error)})"


def _of_store(action: Callable[[dist.Store], T]) -> T | None:
    """What `action` returns for the group's store; None without a group or an answer in time."""
    if not dist.is_initialized():
        return None
    store, answers = dist.distributed_c10d._get_default_store(), []

    def ask() -> None:
        with suppress(Exception):  # the store went away with its host; whatever it is, the error itself comes first
            answers.append(action(store.clone()))

    # A store on a machine that is gone never answers, and has no timeout of its own.
    asking = threading.Thread(target=ask, name="answer of the store", daemon=True)
    asking.start()
    asking.join(STORE_ANSWERS_WITHIN_S)
    return answers[0] if answers else None


def _to_bytes(data: bytes) -> torch.Tensor:
    """uint8 (len(data),), a copy."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _number(variable: str, otherwise: int) -> int:
    """A variable of torchrun's. Raises ConfigError for a value that is no number."""
    text = os.environ.get(variable, str(otherwise))
    if not text.isdecimal():
        raise ConfigError(f"{variable}: found {text!r} in the environment, allowed: a whole number, as torchrun sets")
    return int(text)
