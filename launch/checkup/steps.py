"""Training steps on this device: what they cost, what cuts do to them, and what they leave alone."""

import math
import time
from collections.abc import Iterable
from typing import Any

import torch

import cup
from cup import View
from launch.benches.measure import timed
from launch.checkup.check import Failed, Figure, Machine
from launch.checkup.counting import Operations, synchronising_calls
from train.loop.config import TrainConfig
from train.loop.nonfinite import StepGuard
from train.loop.step import training_step
from train.methods import Action
from train.network.compiling import repeated_blocks
from train.network.ema import MovingAverage
from train.network.models import build_model
from train.network.optim import OptimConfig, build_optimizer
from train.network.precision import Precision
from train.network.state import MEMORY_FORMAT, TrainState
from train.network.widths import NOISE, measured_widths
from train.resizer import Resizer

CLASSES = 100
CUTS = 3
CUT = 1.3
"""FLOPs reduction of each of the cuts: 2.2 in all."""
MIN_PAIRS = 3
"""Of steps timed in turn."""
RECOVERS_WITHIN = 40
"""Steps: fp16's scaler begins at 65,536 and halves its scale at each of those that overflow."""
MAX_EMA_OPERATIONS = 10
SMALLEST_BATCH = 2
"""Images: batch norm takes no fewer where an image has become one pixel."""
SETTLED_AFTER = 2
"""Steps until kernels are chosen and memory is there."""
MAX_COMPILED_ERROR = 0.02
"""Of the largest logit: kernels that are fused round at other places, in bf16 to 8 bits."""


def rates(machine: Machine) -> Figure:
    """Images a second over batch sizes and precisions, with the milliseconds that the host needs to queue a step."""
    precisions = ("bf16", "fp16") if machine.device.type == "cuda" else ("fp32", "bf16")
    rows = []
    for precision in precisions:
        for ema in (True, False):
            state = new_state(machine, precision, ema)
            for batch_size in machine.effort.batch_sizes:
                row = _step_row(machine, state, batch_size)
                rows.append({"precision": precision, "ema": ema, **row})
    of_first = [row for row in rows if row["precision"] == precisions[0] and row["ema"]]
    found = ", ".join(f"{row['images_per_s']:,.1f} ({row['host_ms']:.1f})" for row in of_first)
    sizes = "/".join(str(row["batch_size"]) for row in of_first)
    effort = machine.effort
    text = f"{effort.network}, {effort.image_side} px, {precisions[0]}, EMA, batch {sizes}: {found} images/s (host ms)"
    return Figure(text, {"rows": rows})


def compiled(machine: Machine) -> Figure:
    """Compiled blocks give the logits of eager ones; seconds to compile, and what a step takes then."""
    machine.require_gpu("compiling takes minutes on a CPU, where nobody trains compiled")
    batch_size = machine.effort.batch_sizes[0]
    state = new_state(machine, "bf16", ema=True)
    images, labels = _batch(machine, batch_size)
    eager = _step_row(machine, state, batch_size)
    state.model.eval()
    expected = _logits(state, images)
    for block in repeated_blocks(state.model):
        block.compile(fullgraph=True, dynamic=False)
    error = (_logits(state, images) - expected).abs().max().item() / expected.abs().max().item()
    state.model.train()
    if not error <= MAX_COMPILED_ERROR:
        raise Failed(f"compiled blocks give logits {error:.3f} of the largest away from eager ones")
    compile_s = timed(lambda: training_step(state, images, labels, TrainConfig()), machine.world)
    row = _step_row(machine, state, batch_size)
    torch.compiler.reset()
    text = f"{row['images_per_s']:,.0f} images/s, {eager['images_per_s']:,.0f} eager; {compile_s:.0f} s to compile"
    return Figure(text, {"eager": eager, "compiled": row, "compile_s": compile_s, "error": error})


def reads_of_a_step(machine: Machine) -> Figure:
    """No value of the device is read by the host in a step with EMA, guard and accumulation; few operations for EMA."""
    guard, config = StepGuard(machine.device), TrainConfig(accumulate=2, nonfinite="skip")
    state = new_state(machine, "fp32", ema=True)
    images, labels = _batch(machine, max(4, machine.effort.batch_sizes[0]))

    def step() -> None:
        training_step(state, images, labels, config, guard)

    guard.begin(state)
    for _ in range(SETTLED_AFTER):
        step()
    with Operations() as seen:
        step()
    with Operations() as of_ema:
        state.ema.update_parameters(state.model)
    numbers = {"operations": len(seen.names), "host_reads": len(seen.reads), "ema_operations": len(of_ema.names)}
    if seen.reads:
        raise Failed(f"a step reads {len(seen.reads)} values from the device: {', '.join(sorted(set(seen.reads)))}")
    if len(of_ema.names) > MAX_EMA_OPERATIONS:
        raise Failed(f"the moving average takes {len(of_ema.names)} operations a step, allowed {MAX_EMA_OPERATIONS}")
    text = f"{len(seen.names)} operations, 0 host reads, {len(of_ema.names)} operations for EMA"
    if machine.device.type == "cuda":
        with synchronising_calls() as calls:
            step()
        if calls:
            raise Failed(f"a step waits for the GPU {len(calls)} times: {', '.join(sorted(set(calls))[:5])}")
        text += ", 0 synchronising calls"
    return Figure(text, numbers)


def cuts(machine: Machine) -> Figure:
    """Three cuts on all ranks: equal digests, channels-last strides, finite losses, memory, and time against FR."""
    example = torch.zeros(1, 3, machine.effort.image_side, machine.effort.image_side)
    batch_size = _fitting_batch_size(machine, machine.effort.batch_sizes[-1])
    dense, state = (new_state(machine, "fp32", ema=True) for _ in range(2))
    resizer = Resizer(state.model, example, "all")
    for one in (dense, state):
        one.parallel = machine.world.wrap(one.model)
    # Each rank has losses of its own: where one raises, the others may not go on to the next collective.
    rows = [machine.world.on_every_rank(lambda: _cut_row(machine, batch_size, dense, state, resizer))]
    for _ in range(CUTS):
        _average_statistics(machine, state)
        outcome = resizer.act(_cut, state, machine.world)
        state.ema.begin()
        machine.world.on_every_rank(lambda: _require_strides(state))
        row = {"removed": sum(outcome.removed.values()), "digest": outcome.digests[0]}
        rows.append(row | machine.world.on_every_rank(lambda: _cut_row(machine, batch_size, dense, state, resizer)))
    last = rows[-1]
    if last["speed_up"] <= 1:
        raise Failed(
            f"a step at FR {last['flops_reduction']:.2f} takes {1 / last['speed_up']:.2f} times as long as a dense "
            "one: is it bound by launches (take a larger batch), or does other work run here?"
        )
    reductions, faster = ("/".join(f"{row[key]:.2f}" for row in rows[1:]) for key in ("flops_reduction", "speed_up"))
    text = f"batch {batch_size}, FR {reductions}: steps {faster} times as fast; "
    text += f"digests of {len(outcome.digests)} rank(s) equal"
    if machine.device.type == "cuda":
        peaks = "/".join(f"{row['allocated_bytes'] >> 20}" for row in rows)
        text += f"; {peaks} MiB at the peak, {last['reserved_bytes'] >> 20} reserved"
    return Figure(text, {"batch_size": batch_size, "rows": rows})


def infinities(machine: Machine) -> Figure:
    """A step of gradients that are not finite leaves weights, momentum and running statistics as they are."""
    precisions = ("fp32", "bf16", "fp16") if machine.device.type == "cuda" else ("fp32", "bf16")
    for precision in precisions:
        _require_left_alone(machine, precision)
    return Figure(f"{', '.join(precisions)}: inf and NaN change no bit, training goes on", {"precisions": precisions})


def widths_repeat(machine: Machine) -> Figure:
    """Widths measured twice (prune.round_to: measured): which layers' times repeat, which tables are the same."""
    model = build_model(machine.effort.network, CLASSES)
    side = machine.effort.image_side
    groups = _unlike(cup.prunable_groups(cup.channel_groups(model, torch.zeros(1, 3, side, side)), "inner"))
    batch_size, precision = machine.effort.batch_sizes[-1], Precision("fp32", machine.device)
    tables, scattered = [], []
    for _ in range(2):
        table, unsure = measured_widths(model, groups, batch_size, precision, machine.device)
        tables.append(table)
        scattered += unsure
    shared = [_overlap(*(set(table[group.name]) for table in tables)) for group in groups]
    mean = sum(shared) / len(shared)
    sure = len(groups) - len(set(scattered))
    text = f"{sure} of {len(groups)} layers' times repeat within {NOISE:.0%}; {mean:.0%} of the widths come again"
    if mean < 0.5:
        raise Failed(f"{text}: other work runs here, so take a number for prune.round_to")
    return Figure(text, {"groups": len(groups), "scattered": sorted(set(scattered)), "overlap": shared})


def new_state(machine: Machine, precision: str, ema: bool) -> TrainState:
    """The same weights on every rank."""
    torch.manual_seed(0)
    model = build_model(machine.effort.network, CLASSES)
    model.to(machine.device, memory_format=MEMORY_FORMAT).train()
    average = MovingAverage(model, 0.99) if ema else None
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    return TrainState(model, model, optimizer, Precision(precision, machine.device), average)


def _cut(view: View) -> Action:
    return Action(cup.plan_by_reduction(view.model, view.groups, CUT, cup.PlanOptions(scope="all", round_to=8)))


def _batch(machine: Machine, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(machine.world.rank)
    side = machine.effort.image_side
    images = torch.randn(batch_size, 3, side, side, generator=generator)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator)
    return images.to(machine.device).contiguous(memory_format=MEMORY_FORMAT), labels.to(machine.device)


def _step_row(machine: Machine, state: TrainState, batch_size: int) -> dict[str, float]:
    """Of `effort.steps` training steps. host_ms: until a step is queued; on a CPU that is the whole step."""
    images, labels = _batch(machine, batch_size)
    config = TrainConfig()
    for _ in range(SETTLED_AFTER):
        loss = training_step(state, images, labels, config)
    machine.world.synchronize()
    start = time.perf_counter()
    for _ in range(machine.effort.steps):
        loss = training_step(state, images, labels, config)
    queued = time.perf_counter() - start
    machine.world.synchronize()
    seconds = time.perf_counter() - start
    if not bool(torch.isfinite(loss)):
        raise Failed(f"{state.precision.name}, batch {batch_size}: the loss is {loss.item()}")
    steps = machine.effort.steps
    return {
        "batch_size": batch_size,
        "images_per_s": batch_size * steps / seconds,
        "host_ms": 1e3 * queued / steps,
        "step_ms": 1e3 * seconds / steps,
    }


def _fitting_batch_size(machine: Machine, batch_size: int) -> int:
    """`batch_size`, its half, its quarter ...: the first of which steps fit into the memory of every rank's GPU.

    All ranks call it. Tried without DDP: a rank that runs out of memory there leaves the others in a collective.
    """
    if all(machine.world.all_gather(machine.world.on_every_rank(lambda: _fits(machine, batch_size)))):
        return batch_size
    if batch_size <= SMALLEST_BATCH:
        raise Failed(f"not enough GPU memory for a step of {batch_size} images")
    return _fitting_batch_size(machine, batch_size // 2)


def _fits(machine: Machine, batch_size: int) -> bool:
    try:
        _fill_memory(machine, batch_size)
        is_enough = True
    except torch.OutOfMemoryError:
        is_enough = False
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return is_enough


def _fill_memory(machine: Machine, batch_size: int) -> None:
    """As `cuts` does: two networks that take steps in turn, and beside them what DDP takes for its buckets."""
    states = [new_state(machine, "fp32", ema=True) for _ in range(2)]
    buckets = [torch.empty_like(parameter) for state in states for parameter in state.model.parameters()]
    images, labels = _batch(machine, batch_size)
    for state in states:
        training_step(state, images, labels, TrainConfig())
    del buckets  # kept until here


def _cut_row(
    machine: Machine, batch_size: int, dense: TrainState, state: TrainState, resizer: Resizer
) -> dict[str, Any]:
    """A cut network beside the dense one. first_s: its first step, which builds buckets and chooses kernels.

    step_s, dense_s: the fastest of several, taken in turn, so that a machine that slows down slows both.
    """
    images, labels = _batch(machine, batch_size)

    def step_s(one: TrainState) -> float:
        return timed(lambda: losses.append(training_step(one, images, labels, TrainConfig())), machine.world)

    losses: list[torch.Tensor] = []
    first_s, row = step_s(state), {}
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)
        step_s(state)
        row["allocated_bytes"] = torch.cuda.max_memory_allocated(machine.device)
        row["reserved_bytes"] = torch.cuda.memory_reserved(machine.device)
    pairs = [(step_s(state), step_s(dense)) for _ in range(max(MIN_PAIRS, machine.effort.steps))]
    if not bool(torch.isfinite(torch.stack(losses)).all()):
        raise Failed(f"a loss is not finite at FR {resizer.reduction:.2f}")
    own_s, dense_s = (min(seconds) for seconds in zip(*pairs, strict=True))
    return row | {
        "flops_reduction": resizer.reduction,
        "first_s": first_s,
        "step_s": own_s,
        "dense_s": dense_s,
        "speed_up": dense_s / own_s,
    }


def _average_statistics(machine: Machine, state: TrainState) -> None:
    """As the trainer does before a cut: each rank's batch norm has seen other images."""
    for model in (state.model, state.ema.module):
        machine.world.average_buffers(model)


def _require_strides(state: TrainState) -> None:
    """Channels-last weights, momentum and EMA: else every convolution is preceded by a copy, which no error tells."""
    momentum = [own["momentum_buffer"] for own in state.optimizer.state.values()]
    kinds: dict[str, Iterable[torch.Tensor]] = {
        "weights": state.model.parameters(),
        "momentum": momentum,
        "moving average": state.ema.module.parameters(),
    }
    for kind, tensors in kinds.items():
        if any(one.dim() == 4 and not one.is_contiguous(memory_format=MEMORY_FORMAT) for one in tensors):
            raise Failed(f"{kind} after a cut are not in channels-last memory format")


def _require_left_alone(machine: Machine, precision: str) -> None:
    """Raises Failed where a step of infinite or NaN pixels changes the state, or no step after it does."""
    state, guard = new_state(machine, precision, ema=False), StepGuard(machine.device)
    images, labels = _batch(machine, max(4, machine.effort.batch_sizes[0]))
    config = TrainConfig(precision=precision, nonfinite="skip")
    guard.begin(state)
    training_step(state, images, labels, config, guard)
    before = [tensor.clone() for tensor in _tensors(state)]

    def is_as_before() -> bool:
        return all(map(torch.equal, before, _tensors(state)))

    for value in (math.inf, math.nan):
        spoiled = images.clone()
        spoiled[0, 0, 0, 0] = value
        training_step(state, spoiled, labels, config, guard)
        if not is_as_before():
            raise Failed(f"{precision}: a step of {value} in one pixel changed weights, momentum or statistics")
    for _ in range(RECOVERS_WITHIN):
        training_step(state, images, labels, config, guard)
        if not is_as_before():
            break
    if is_as_before() or not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(state)):
        raise Failed(f"{precision}: training does not go on after a step that was left out")


def _tensors(state: TrainState) -> list[torch.Tensor]:
    """Weights, momentum, running statistics."""
    momentum = [own["momentum_buffer"] for own in state.optimizer.state.values()]
    buffers = [buffer for buffer in state.model.buffers() if buffer.is_floating_point()]
    return [*(parameter.detach() for parameter in state.model.parameters()), *momentum, *buffers]


@torch.no_grad()
def _logits(state: TrainState, images: torch.Tensor) -> torch.Tensor:
    with state.precision.autocast():
        return state.model(images).float()


def _unlike(groups: list[cup.ChannelGroup]) -> list[cup.ChannelGroup]:
    """One group of each width: the deeper a network, the more of them are alike."""
    return list({group.width: group for group in groups}.values())


def _overlap(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)
