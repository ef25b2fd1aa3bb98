"""Writes what a run needs to go on: the state of every rank, between any two steps, while training goes on.

A checkpoint holds rank 0's network and, in the middle of an epoch, what differs between the ranks: random generators,
loader position, running statistics of batch norm (they are averaged at an epoch's end), sums of the epoch.
"""

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from cup import Device
from data import Preprocessing
from train.checkpoint.file import copy_checkpoint, save_checkpoint
from train.checkpoint.network import plans_to_store
from train.checkpoint.snapshot import snapshot
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
    """Writes a run's checkpoints, one at a time, on a thread of rank 0. All ranks have one."""

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
        self._best = _best(progress)
        """What lies in best.pt."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[dict[str, Any]] | None = None
        """On rank 0, the write whose outcome the ranks do not know yet."""
        self._is_open = False
        """Whether there is one, the same on all ranks."""
        self.failure = ""
        """Why the last checkpoint could not be written, the same on all ranks; empty if it was."""

    def save(self, trainer: Trainer, is_best: bool) -> None:
        """Begin to write `last`, and `best` where it is, as the run stands now. All ranks call it, between two steps.

        Training may go on: what is written is a snapshot. The write before, if it is not over, is waited for. Raises
        TrainError, on all ranks, if the weights are not finite.
        """
        self.finish(trainer)
        world = trainer.world
        ranks = world.all_gather(world.on_every_rank(lambda: _state_of_rank(trainer)))
        world.on_rank_zero(lambda: self._begin(trainer, ranks, is_best))
        self._is_open = True
        trainer.watch.saved()

    def has_news(self) -> bool:
        """On rank 0, whether a write is over and `finish` would not wait. Elsewhere False."""
        return self._writing is not None and self._writing.done()

    def finish(self, trainer: Trainer) -> None:
        """Wait for the write that is under way, if any, and take in what became of it. All ranks call it.

        A failed write is noted once and tried again at the next save; `failure` holds the reason meanwhile. If best.pt
        failed, `trainer.progress` goes back to the best that it holds.
        """
        if not self._is_open:
            return
        failed_before = bool(self.failure)
        written = trainer.world.on_rank_zero(lambda: self._writing.result())
        self._writing, self._is_open = None, False
        self._best, self.failure = written["best"], "; ".join(written["failures"])
        # So that the next one that beats what lies in best.pt takes its place.
        trainer.progress.best_top1, trainer.progress.best_top5 = self._best["best_top1"], self._best["best_top5"]
        if bool(self.failure) != failed_before:
            message = f"{self.failure}; training goes on" if self.failure else "checkpoints can be written again"
            trainer.sinks.note(message, trainer.ledger.total_s)

    def close(self, trainer: Trainer) -> None:
        """Let a write that is under way come to its end where the run has not: each rank for itself."""
        self._thread.shutdown()
        if self._writing is None:
            return
        error = self._writing.exception()
        if why := str(error) if error else "; ".join(self._writing.result()["failures"]):
            trainer.sinks.note(why, trainer.ledger.total_s)

    def _begin(self, trainer: Trainer, ranks: list[dict[str, Any]], is_best: bool) -> None:
        """On rank 0. What the thread does not do is what the training loop changes: the log, and the tensors."""
        are_finite = [torch.isfinite(parameter).all() for parameter in trainer.state.model.parameters()]
        if not bool(torch.stack(are_finite).all()):
            raise TrainError(f"the weights are not finite after step {trainer.progress.step}: {AFTER_NONFINITE}")
        try:
            create_run_dir(self._run_dir, self._config, self._run_id)  # which may have gone since
            trainer.sinks.sync_log()
            content = snapshot(self._content(trainer, ranks))
        except (TrainError, OSError) as error:
            self._writing = Future()
            self._writing.set_result({"best": self._best, "failures": [self._why(error)]})
        else:
            self._writing = self._thread.submit(self._write, content, is_best)

    def _write(self, content: dict[str, Any], is_best: bool) -> dict[str, Any]:
        """On rank 0's thread; returns what lies in best.pt now, and the errors."""
        best, failures = self._best, []
        try:
            if is_best:
                try:
                    save_checkpoint(self._run_dir.best, content)
                    best = {key: content["progress"][key] for key in best}
                except TrainError as error:
                    failures.append(str(error))
                    content["progress"] |= best
            if best is self._best:
                save_checkpoint(self._run_dir.last, content, keep=self._config.run.keep)
            else:
                copy_checkpoint(self._run_dir.best, self._run_dir.last, keep=self._config.run.keep)
        except (TrainError, OSError) as error:
            failures.append(self._why(error))
        return {"best": best, "failures": failures}

    def _why(self, error: TrainError | OSError) -> str:
        if isinstance(error, TrainError):
            return str(error)
        # What a network drive answers to the simplest question: EIO, ESTALE, EACCES.
        return f"could not write in {self._run_dir.path}: {why_unwritten(error, self._run_dir.log)}"

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
