"""Writes what a run needs to go on: the state of every rank, between any two steps.

A checkpoint holds rank 0's network and, in the middle of an epoch, what differs between the ranks: random generators,
loader position, running statistics of batch norm (they are averaged at an epoch's end), sums of the epoch.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from cup import Device
from data import Preprocessing
from train.checkpoint.file import save_checkpoint
from train.checkpoint.network import plans_to_store
from train.config import RunConfig
from train.config_file import create_run_dir
from train.errors import TrainError
from train.files import why_unwritten
from train.log.rundir import RunDir
from train.loop.nonfinite import AFTER_NONFINITE
from train.loop.progress import Progress
from train.loop.trainer import Trainer
from train.methods import Method
from train.network.models import Architecture
from train.network.widths import AllowedWidths


class Saver:
    """Writes a run's checkpoints. All ranks have one; rank 0's writes."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        run_id: str | None,
        architecture: Architecture,
        preprocessing: Preprocessing,
        global_batch_size: int,
        allowed_widths: AllowedWidths | None,
        step_device: Device | None,
        progress: Progress,
    ) -> None:
        """preprocessing: what became of the settings that `config` leaves open. progress: where the run goes on.

        global_batch_size: as it is; `config` may ask for more (train/build.py).

        allowed_widths: as measured for `round_to: measured`, step_device: whose seconds `target_speedup` means; a
        resumed run must plan with the same ones.
        """
        self._config = config
        self._preprocessing = preprocessing
        self._global_batch_size = global_batch_size
        self._allowed_widths = allowed_widths
        self._step_device = step_device and step_device.to_dict()
        self._run_dir, self._run_id = run_dir, run_id
        self._architecture = architecture
        self._best = _best(progress)  # what lies in best.pt
        self.failure = ""
        """Why the last checkpoint could not be written, the same on all ranks; empty if it was."""

    def save(self, trainer: Trainer, is_best: bool) -> None:
        """Write `last`, and `best` where it is. All ranks call it, between two steps.

        A failed write is noted once and tried again at the next save; `failure` holds the reason meanwhile. If best.pt
        failed, `trainer.progress` goes back to the best that it holds. Raises TrainError, on all ranks, if the weights
        are not finite.
        """
        world = trainer.world
        ranks = world.all_gather(world.on_every_rank(lambda: _state_of_rank(trainer)))
        failed_before = bool(self.failure)
        written = world.on_rank_zero(lambda: self._write(trainer, ranks, is_best))
        self.failure = "; ".join(written["failures"])
        if written["best"]:
            self._best = _best(trainer.progress)
        elif is_best:  # so that the next one that beats what lies in best.pt takes its place
            trainer.progress.best_top1, trainer.progress.best_top5 = self._best.values()
        trainer.watch.saved()
        if bool(self.failure) != failed_before:
            message = f"{self.failure}; training goes on" if self.failure else "checkpoints can be written again"
            trainer.sinks.note(message, trainer.ledger.total_s)

    def _write(self, trainer: Trainer, ranks: list[dict[str, Any]], is_best: bool) -> dict[str, Any]:
        """On rank 0; returns whether best.pt was written, and the errors."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trainer.state.model.parameters()):
            raise TrainError(f"the weights are not finite after step {trainer.progress.step}: {AFTER_NONFINITE}")
        wrote_best, failures = False, []
        try:
            create_run_dir(self._run_dir, self._config, self._run_id)  # which may have gone since
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
            why = why_unwritten(error, self._run_dir.log)
            failures.append(f"could not write in {self._run_dir.path}: {why}")
        return {"best": wrote_best, "failures": failures}

    def _content(self, trainer: Trainer, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        state, before = trainer.state, trainer.progress.gpu_hours_before
        buffers = [rank["buffers"] or {"model": {}, "ema": {}} for rank in ranks]
        return {
            "architecture": dataclasses.asdict(self._architecture),
            "run_id": self._run_id,
            "config": self._config.to_dict(),
            "classes": trainer.loop.loader.classes and list(trainer.loop.loader.classes),
            "preprocessing": dataclasses.asdict(self._preprocessing),
            "plans": plans_to_store(trainer.resizer.plans),
            "widths": trainer.resizer.widths,
            "allowed_widths": self._allowed_widths,
            "step_device": self._step_device,
            "method": {"name": self._config.prune.method, "state": plain_state(trainer.method)},
            "progress": dict(vars(trainer.progress)),
            "batch_size": self._global_batch_size,
            "gpu_hours": None if before is None else before + trainer.ledger.gpu_hours(trainer.ledger.total_s),
            "log": trainer.sinks.log_text,
            "model": _with_means(state.model.state_dict(), [own["model"] for own in buffers]),
            "ema": state.ema and _with_means(state.ema.state_dict(), [own["ema"] for own in buffers]),
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.precision.scaler.state_dict(),
            "ranks": ranks,
        }


def _best(progress: Progress) -> dict[str, float]:
    return {"best_top1": progress.best_top1, "best_top5": progress.best_top5}


def _state_of_rank(trainer: Trainer) -> dict[str, Any]:
    """What differs between the ranks."""
    state, so_far, device = trainer.state, trainer.so_far, trainer.world.device
    own = {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "train_loader": trainer.loop.loader.state_dict(),
        "ledger": trainer.ledger.state_dict(),
        "so_far": None,
        "buffers": None,
    }
    if so_far is not None:
        modules = {"model": state.model, "ema": state.ema}
        buffers = {
            part: {name: b.cpu() for name, b in running_statistics(module).items()} for part, module in modules.items()
        }
        own |= {"so_far": so_far.state_dict(), "buffers": buffers}
    return own


def running_statistics(module: nn.Module | None) -> dict[str, torch.Tensor]:
    """Name -> floating-point buffer, of those that a state dict holds."""
    if module is None:
        return {}
    stored = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in stored and buffer.is_floating_point()}


def _with_means(weights: dict[str, torch.Tensor], buffers: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The weights with the mean of the ranks' running statistics, which is what an evaluation takes."""
    means = {name: sum(own[name] for own in buffers) / len(buffers) for name in buffers[0]}
    weights.update(means)  # in place: it also holds the versions of the modules
    return weights


def plain_state(method: Method) -> dict[str, Any]:
    """A method's state. Raises TypeError for one that a resume could not read. Each rank, no collective."""
    state = method.state_dict()
    if not _is_plain(state):
        raise TypeError(
            f"{type(method).__name__}.state_dict() must hold plain data and CPU tensors alone: found {state}"
        )
    return state


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) in (str, int) and _is_plain(entry) for key, entry in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, torch.Tensor):
        return value.device.type == "cpu"
    return value is None or type(value) in (str, int, float, bool)
