"""Brings a run to where a checkpoint was written."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from cup import CupError, Device
from data import DataError, Loader
from train.checkpoint.archive import CheckpointError
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import stored_plans
from train.checkpoint.saver import running_statistics
from train.checkpoint.weights import with_versions
from train.log.ledger import Ledger
from train.log.rundir import EVENTS, first_bad_line
from train.loop.progress import EpochSoFar, Progress
from train.methods import Method
from train.network.state import TrainState
from train.network.widths import AllowedWidths
from train.resizer import Resizer
from train.schema import fits
from train.world import World

T = TypeVar("T")

# What a checkpoint of a run holds beside the network.
RUN_PARTS = {
    "run_id": str | None,
    "progress": {"epoch": range(10**9), "step": int, "last_line": EVENTS["epoch"]},
    "optimizer": dict,
    "scaler": dict,
    "ranks": list,
    "log": str | None,
    "batch_size": range(1, 10**9),
    "allowed_widths": dict[str, list[int]] | None,
    "step_device": dict | None,
    "method": dict,
}


MISFITS = (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError, CupError)
"""What content raises that is not as a run writes it."""


@dataclass
class Restored:
    """What a run goes on from, on one rank.

    notes: what could not be restored and changes nothing but the random numbers, as messages for the user.
    """

    progress: Progress
    so_far: EpochSoFar | None
    allowed_widths: AllowedWidths | None
    step_device: Device | None
    notes: list[str]


def load_run(path: Path) -> dict[str, Any]:
    """The content of a run's checkpoint. Raises CheckpointError for a damaged one and for a network alone."""
    stored = load_checkpoint(path)
    wrong = [key for key, kind in RUN_PARTS.items() if key not in stored or not fits(stored[key], kind)]
    if wrong:
        raise CheckpointError(
            f"{path} cannot be resumed, {', '.join(wrong)} missing or not as written: start another run with "
            "--model.checkpoint"
        )
    if stored["log"] is None and not fits(stored.get("log_bytes"), range(1 << 40)):
        raise CheckpointError(f"{path} cannot be resumed, it says nothing of the log")
    if problem := first_bad_line(stored["log"] or ""):
        raise CheckpointError(f"{path} cannot be resumed, its log is not as written: {problem}")
    return stored


def restore(
    stored: dict[str, Any],
    state: TrainState,
    resizer: Resizer,
    ledger: Ledger,
    loader: Loader,
    world: World,
    global_batch_size: int,
) -> Restored:
    """Bring fresh parts of a run to where the checkpoint was written: widths first, then all that has them.

    state, resizer, ledger, loader: changed in place. global_batch_size: as it is now. Running statistics that differ
    between the ranks come later, by `restore_running_statistics`. Raises CheckpointError for content that does not fit.
    """
    try:
        resizer.replay(state, stored_plans(stored))
        state.model.load_state_dict(with_versions(state.model, stored["model"]))
        if state.ema is not None:
            state.ema.load_state_dict(with_versions(state.ema, stored["ema"]))
        state.optimizer.load_state_dict(stored["optimizer"])
        _require_equal_kinds(state.optimizer)
        state.precision.scaler.load_state_dict(stored["scaler"])
        ranks = stored["ranks"]
        ledger.load_state_dict(ranks[min(world.rank, len(ranks) - 1)]["ledger"])
        ledger.add_cpu_before(_cpu_s_of(ranks) if world.is_main else 0.0)
        so_far = _restored_epoch(stored, ledger, world, global_batch_size, len(loader))
        return Restored(
            progress=_as_written(Progress, stored["progress"]),
            so_far=so_far,
            allowed_widths=stored["allowed_widths"],
            step_device=stored["step_device"] and Device.from_dict(stored["step_device"]),
            notes=_restore_random_numbers(ranks, loader, world, so_far),
        )
    except MISFITS as error:
        raise CheckpointError(f"the stored state does not fit this network: {error}") from error


def restore_method(stored: dict[str, Any], method: Method, name: str) -> None:
    """Give a method its state back. name: of the configured one. CheckpointError for the state of another."""
    found = stored["method"].get("name")
    if found != name:
        raise CheckpointError(f"the checkpoint holds the state of method {found!r}, but prune.method is {name}")
    try:
        method.load_state_dict(stored["method"]["state"])
    except MISFITS as error:
        raise CheckpointError(f"the stored state does not fit the method {name}: {error}") from error


def restore_running_statistics(stored: dict[str, Any], state: TrainState, world: World) -> None:
    """Give this rank its own running statistics back, where the checkpoint was written in the middle of an epoch.

    After the comparison of the ranks, for here they differ. Another number of ranks than then keeps the mean.
    """
    ranks = stored["ranks"]
    buffers = ranks[world.rank]["buffers"] if len(ranks) == world.size else None
    if buffers is None:
        return
    try:
        for own, module in [(buffers["model"], state.model), (buffers["ema"], state.ema)]:
            for name, buffer in running_statistics(module).items():
                buffer.copy_(own[name])
    except MISFITS as error:
        raise CheckpointError(f"the stored running statistics do not fit this network: {error}") from error


def _require_equal_kinds(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError unless the state of all parameters is of the same kinds, as any optimizer keeps it."""
    kinds = {tuple(sorted(((k, type(v)) for k, v in own.items()), key=str)) for own in optimizer.state.values()}
    known = (torch.Tensor, int, float, type(None))
    if len(kinds) > 1 or any(not issubclass(kind, known) for own in kinds for _, kind in own):
        raise TypeError("the optimizer's state is not of the same kind for all parameters")


def _cpu_s_of(ranks: list[dict[str, Any]]) -> float | None:
    """CPU seconds of all ranks up to the checkpoint; None where an earlier version wrote it, which did not count."""
    counted = [rank["ledger"].get("cpu_s") for rank in ranks]
    return None if None in counted else float(sum(counted))


def _restored_epoch(
    stored: dict[str, Any], ledger: Ledger, world: World, global_batch_size: int, steps: int
) -> EpochSoFar | None:
    """Raises TypeError for what no run of ours writes."""
    ranks = stored["ranks"]
    if ranks[0]["so_far"] is None:
        return None
    parts = [_as_written(EpochSoFar, rank["so_far"]) for rank in ranks]
    if any(part.seconds_before.keys() != ledger.seconds.keys() for part in parts):
        raise TypeError("the seconds of the epoch's beginning are not as written")
    return EpochSoFar.restored(parts, world, Fraction(global_batch_size, stored["batch_size"]), steps)


def _restore_random_numbers(
    ranks: list[dict[str, Any]], loader: Loader, world: World, so_far: EpochSoFar | None
) -> list[str]:
    """Generators and the loader's position; returns notes for the user."""
    notes = []
    if not loader.same_images(ranks[0]["train_loader"]):
        note = "the training images are not those of the checkpoint, or have other names, labels or shards"
        if so_far is not None and 0 < so_far.step < len(loader):
            note += "; this epoch goes on in another order, so some of them come twice in it and others not at all"
        notes.append(note)
    if len(ranks) != world.size:
        note = f"resumed on {world.size} ranks, stored by {len(ranks)}: augmentation and dropout draw other numbers"
        return [*notes, note]
    mine = ranks[world.rank]
    torch.set_rng_state(mine["rng"])
    if mine["cuda_rng"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda_rng"], world.device)
    try:
        loader.load_state_dict(mine["train_loader"])
    except DataError as error:  # other images, which the note tells, or another loader or DALI version: other crops
        return notes or [f"augmentation draws other numbers than before: {error}"]
    return notes


def _as_written(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass of these values. Raises TypeError if one is missing, unknown or of another kind."""

    wrong = [n for n, hint in get_type_hints(kind).items() if n not in values or not fits(values[n], hint)]
    if wrong:
        raise TypeError(f"{kind.__name__}: {', '.join(wrong)} missing or not as written")
    return kind(**values)
