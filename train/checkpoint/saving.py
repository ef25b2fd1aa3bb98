"""What a run saves and how it goes on from there: the state of every rank, at any step, and the seconds in between.

A checkpoint holds rank 0's network and, in the middle of an epoch, what differs between the ranks: random generators,
loader position, running statistics of batch norm (they are averaged at an epoch's end), sums of the epoch.
"""

import dataclasses
import json
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch
from torch import nn

from data import DataError
from train.checkpoint.file import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    plans_to_store,
    save_checkpoint,
    stored_plans,
)
from train.config import RunConfig
from train.errors import TrainError
from train.log.ledger import Ledger
from train.loop.engine import AFTER_NONFINITE, EpochSoFar, Progress, Trainer
from train.network.models import Architecture
from train.rundir import RunDir, create_run_dir
from train.world import World

T = TypeVar("T")

BEAT_EVERY_S = 5.0

# What a checkpoint of a run holds beside the network, for a resume.
RUN_PARTS = {
    "progress": dict,
    "optimizer": dict,
    "scaler": dict,
    "ranks": list,
    "log_bytes": int,
    "batch_size": int,
    "allowed_widths": dict | None,
}


class Saver:
    """Writes a run's checkpoints. All ranks have one; rank 0's writes."""

    def __init__(
        self, config: RunConfig, run_dir: RunDir, architecture: Architecture, batch_size: int, progress: Progress
    ) -> None:
        """batch_size: images a step of all ranks, as it is; `config` may ask for more (train/run.py).

        progress: as the run goes on from.
        """
        self._config = config
        self._batch_size = batch_size
        self._run_dir = run_dir
        self._architecture = architecture
        self._best = _best(progress)  # what lies in best.pt
        self._beaten_at = -BEAT_EVERY_S
        self.failure = ""
        """Why the last checkpoint could not be written, the same on all ranks; empty if it was."""

    def save(self, trainer: Trainer, is_best: bool) -> None:
        """Write `last`, and `best` where it is. All ranks call it, between two steps.

        What cannot be written is noted, once, and tried again the next time: `failure` says so meanwhile. Where that is
        `best`, `trainer.progress` goes back to the best that could be written. Raises TrainError, on all ranks, if the
        weights are not finite.
        """
        world = trainer.world
        ranks = world.gather(_state_of_rank(trainer))
        failed_before = bool(self.failure)
        written = world.on_rank_zero(lambda: self._write(trainer, ranks, is_best))
        self.failure = "; ".join(written["failures"])
        if written["best"]:
            self._best = _best(trainer.progress)
        elif is_best:  # so that the next one that beats what lies in best.pt takes its place
            vars(trainer.progress).update(self._best)
        trainer.watch.saved()
        if bool(self.failure) != failed_before:
            message = f"{self.failure}; training goes on" if self.failure else "checkpoints can be written again"
            trainer.sinks.write({"event": "note", "time_s": trainer.ledger.total_s, "message": message})

    def beat(self, ledger: Ledger, at_once: bool = False) -> None:
        """Leave word of the seconds so far, every few seconds, in case this process is killed. Rank 0 only."""
        if (now := time.monotonic()) - self._beaten_at < BEAT_EVERY_S and not at_once:
            return
        self._beaten_at = now
        with suppress(OSError):  # a full disk is reported where it matters, by the checkpoint
            _write_alive(self._run_dir.alive, ledger)

    def _write(self, trainer: Trainer, ranks: list[dict[str, Any]], is_best: bool) -> dict[str, Any]:
        """On rank 0; returns whether `best` was written, and why what could not be written could not."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trainer.state.model.parameters()):
            raise TrainError(f"the weights are not finite after step {trainer.progress.step}: {AFTER_NONFINITE}")
        wrote_best, failures = False, []
        try:
            create_run_dir(self._run_dir, self._config)  # which may have gone since
            trainer.sinks.sync_log()
            content = self._content(trainer, ranks)
            if is_best:
                try:
                    save_checkpoint(self._run_dir.best, content)
                    wrote_best = True
                except TrainError as error:
                    failures.append(str(error))
                    content["progress"] |= self._best
            save_checkpoint(self._run_dir.last, content, keep=self._config.run.keep)
        except TrainError as error:
            failures.append(str(error))
        except OSError as error:  # what a network drive answers to the simplest question: EIO, ESTALE, EACCES
            failures.append(f"could not write in {self._run_dir.path}: {error}")
        return {"best": wrote_best, "failures": failures}

    def _content(self, trainer: Trainer, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        state, before = trainer.state, trainer.progress.gpu_hours_before
        buffers = [rank["buffers"] or {"model": {}, "ema": {}} for rank in ranks]
        return {
            "architecture": dataclasses.asdict(self._architecture),
            "config": self._config.to_dict(),
            "plans": plans_to_store(trainer.resizer.plans),
            "widths": trainer.resizer.widths,
            "allowed_widths": trainer.resizer.allowed_widths,
            "progress": dict(vars(trainer.progress)),
            "batch_size": self._batch_size,
            "gpu_hours": None if before is None else before + trainer.ledger.gpu_hours(trainer.ledger.total_s),
            "log_bytes": trainer.sinks.log_bytes,
            "model": _with_means(state.model.state_dict(), [own["model"] for own in buffers]),
            "ema": state.ema and _with_means(state.ema.state_dict(), [own["ema"] for own in buffers]),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.precision.scaler.state_dict(),
            "ranks": ranks,
        }


def load_stored(run_dir: RunDir, world: World) -> tuple[dict[str, Any] | None, list[Path], list[str]]:
    """The checkpoint to go on from, on every rank, None for a run that begins; damaged files; words for the user.

    All ranks call it. Where the newest is damaged it is the one before, and the damaged ones have to be put aside
    before training goes on. Raises CheckpointError if none can be read, or all are gone.
    """

    def find() -> dict[str, Any]:
        try:
            path, damaged = newest_checkpoint(run_dir.last)
        except OSError as error:
            raise CheckpointError(f"cannot look for checkpoints in {run_dir.path}: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{error}; delete them to start this run over, or take --run.resume never") from error
        if path is None:
            _require_young(run_dir)
        return {"path": path and str(path), "damaged": {str(file): why for file, why in damaged.items()}}

    found = world.on_rank_zero(find)
    if found["path"] is None:
        return None, [], []
    stored = world.together(lambda: load_checkpoint(Path(found["path"])))
    wrong = [key for key, kind in RUN_PARTS.items() if key not in stored or not isinstance(stored[key], kind)]
    if wrong:
        raise CheckpointError(
            f"{found['path']} cannot be gone on from, {', '.join(wrong)} missing or not as written: start another run "
            "with --model.from"
        )
    notes = [
        f"{why}; going on from {found['path']}, which was written before, and {Path(file).name} becomes "
        f"{Path(file).name}.damaged"
        for file, why in found["damaged"].items()
    ]
    return stored, [Path(file) for file in found["damaged"]], notes


def _require_young(run_dir: RunDir) -> None:
    """Raises CheckpointError for a run that is past its first epoch: starting over would write over what is left of it.

    A kill in the first save leaves that epoch's line, and perhaps `best`; then nothing but this epoch is lost.
    """
    epochs = [event.get("epoch", 0) for event in run_dir.events() if event.get("event") == "epoch"]
    if run_dir.best.exists():
        epochs.append(load_checkpoint(run_dir.best).get("progress", {}).get("epoch", 0))
    if max(epochs, default=0) > 1:
        raise CheckpointError(
            f"{run_dir.path} holds {max(epochs)} epochs of an unfinished run, but {run_dir.last.name} and those before "
            "it are not there: put one back, delete the directory to start over, or take --run.resume never"
        )


def restore(trainer: Trainer, stored: dict[str, Any], batch_size: int) -> list[str]:
    """Bring a fresh trainer to where the checkpoint was written: widths first, then everything that has them.

    batch_size: images a step of all ranks, now.
    Returns what could not be restored and changes nothing but the random numbers, in words for the user. Running
    statistics come later, by `restore_buffers`.
    """
    state = trainer.state
    try:
        trainer.resizer.replay(state, stored_plans(stored))
        trainer.resizer.allowed_widths = stored["allowed_widths"]
        state.model.load_state_dict(stored["model"])
        if state.ema is not None:
            state.ema.load_state_dict(stored["ema"])
        state.optimizer.load_state_dict(stored["optimizer"])
        state.precision.scaler.load_state_dict(stored["scaler"])
        trainer.progress = _as_written(Progress, stored["progress"])
        trainer.is_resumed = True
        return _restore_rank(trainer, stored, batch_size)
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the stored state does not fit this network: {error}") from error


def restore_buffers(trainer: Trainer, stored: dict[str, Any]) -> None:
    """Give this rank its own running statistics back, where the checkpoint was written in the middle of an epoch.

    After the ranks' states have been compared, for here they differ. Other ranks than then keep the mean of all.
    """
    buffers = stored["ranks"][trainer.world.rank]["buffers"] if len(stored["ranks"]) == trainer.world.size else None
    if buffers is None:
        return
    state = trainer.state
    for own, module in [(buffers["model"], state.model), (buffers["ema"], state.ema)]:
        for name, buffer in _running(module).items():
            buffer.copy_(own[name])


def lost_seconds(run_dir: RunDir, stored: dict[str, Any] | None) -> dict[str, float]:
    """What killed processes spent after the checkpoint: wall and rank seconds. Rank 0 only."""
    try:
        alive = json.loads(run_dir.alive.read_text(encoding="utf-8"))
        spent = {key: float(alive[key]) for key in ("wall_s", "rank_s")}
    except (OSError, ValueError, KeyError, TypeError):  # none, or cut short by the crash
        return {"wall_s": 0.0, "rank_s": 0.0}
    if stored is not None:
        account = stored["ranks"][0]["ledger"]
        spent["wall_s"] -= sum(account["seconds"].values())
        spent["rank_s"] -= account["rank_s"]
    return {key: max(0.0, seconds) for key, seconds in spent.items()}


def _best(progress: Progress) -> dict[str, float]:
    return {"best_top1": progress.best_top1, "best_top5": progress.best_top5}


def _write_alive(path: Path, ledger: Ledger) -> None:
    temporary = path.with_name(path.name + ".part")
    wall_s = ledger.total_s
    temporary.write_text(json.dumps({"wall_s": wall_s, "rank_s": ledger.gpu_hours(wall_s) * 3600}), encoding="utf-8")
    temporary.replace(path)


def _state_of_rank(trainer: Trainer) -> dict[str, Any]:
    """What differs between the ranks."""
    state, so_far, device = trainer.state, trainer.so_far, trainer.world.device
    own = {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "train_loader": trainer.train_loader.state_dict(),
        "ledger": trainer.ledger.state_dict(),
        "so_far": None,
        "buffers": None,
    }
    if so_far is not None:
        modules = {"model": state.model, "ema": state.ema}
        buffers = {part: {name: b.cpu() for name, b in _running(module).items()} for part, module in modules.items()}
        own |= {"so_far": so_far.state_dict(), "buffers": buffers}
    return own


def _running(module: nn.Module | None) -> dict[str, torch.Tensor]:
    """Name -> floating-point buffer."""
    named = () if module is None else module.named_buffers()
    return {name: buffer for name, buffer in named if buffer.is_floating_point()}


def _with_means(weights: dict[str, torch.Tensor], buffers: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The weights with the mean of the ranks' running statistics, which is what an evaluation takes."""
    return weights | {name: sum(own[name] for own in buffers) / len(buffers) for name in buffers[0]}


def _as_written(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass of these values. Raises TypeError if one is missing, unknown or of another kind."""

    def fits(value: Any, hint: Any) -> bool:
        hint = dict if get_origin(hint) is dict else hint
        return isinstance(value, hint) or (isinstance(value, int) and hint in (float, float | None))

    wrong = [n for n, hint in get_type_hints(kind).items() if n not in values or not fits(values[n], hint)]
    if wrong:
        raise TypeError(f"{kind.__name__}: {', '.join(wrong)} missing or not as written")
    return kind(**values)


def _restore_rank(trainer: Trainer, stored: dict[str, Any], batch_size: int) -> list[str]:
    """Raises TypeError for what no run of ours writes. Returns notes for the log."""
    ranks, world, loader = stored["ranks"], trainer.world, trainer.train_loader
    trainer.ledger.load_state_dict(ranks[min(world.rank, len(ranks) - 1)]["ledger"])
    if ranks[0]["so_far"] is not None:
        parts = [_as_written(EpochSoFar, rank["so_far"]) for rank in ranks]
        if any(part.seconds_before.keys() != trainer.ledger.seconds.keys() for part in parts):
            raise TypeError("the seconds of the epoch's beginning are not as written")
        ratio = Fraction(batch_size, stored["batch_size"])
        trainer.so_far = EpochSoFar.restored(parts, world, ratio, len(loader))
    notes = []
    if not loader.same_images(ranks[0]["train_loader"]):
        note = "the training images are not those of the checkpoint, or have other names, labels or shards"
        if trainer.so_far is not None and 0 < trainer.so_far.step < len(loader):
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
