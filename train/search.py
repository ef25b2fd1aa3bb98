"""MetaPruning's second stage: the best widths inside a FLOPs window, as networks with a PruningNet's weights tell.

    evolution (cup) asks for a generation -> each rank takes every so-many-th network of it, on its own:
    weights from the PruningNet, batch-norm statistics from training images, top-1 on the images held out

What is found does not depend on the number of ranks. Every network that was judged is a line of the log, beside the
widths; a search that was killed repeats itself with the answers that stand there, and so ends with the same widths.
"""

import copy
import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import cup
from cup import EvolutionOptions, FlopsByWidths, WidthSpace
from data import build_search_loaders
from train.build import build_pruning_net
from train.checkpoint.archive import CheckpointError
from train.checkpoint.file import load_checkpoint
from train.checkpoint.network import holds_pruning_net, stored_architecture, stored_weights
from train.checkpoint.weights import load_weights
from train.config import RunConfig, config_from_dict, differing_keys
from train.errors import ConfigError, TrainError
from train.files import why_unwritten, write_durably
from train.log.heartbeat import Beat, read_alive, write_alive
from train.log.ledger import Ledger
from train.log.rundir import read_log
from train.log.sinks import JsonLines
from train.loop.evaluation import evaluate
from train.loop.recalibrate import recalibrate
from train.network.models import build_model
from train.network.precision import Precision
from train.network.pruning_net import PruningNet, widths_at_scales
from train.network.state import MEMORY_FORMAT
from train.world import World


@dataclass(frozen=True, kw_only=True)
class SearchOptions(EvolutionOptions):
    """What to look for, and how networks are judged. What is stored of a search must be equal for it to go on."""

    target_reduction: float
    """FLOPs reduction that the networks have at least, against the full network, in the paper's counting."""
    window: float = 0.01
    """How much further it may be, relative."""
    recalibration_batches: int = 100
    """Batches of training images from which a network's batch-norm statistics are computed."""
    batch_size: int | None = None
    """Images a step of one rank. None = the run's, of all its ranks."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError, or CupError, naming the field, the value found and what is allowed."""
        super().__post_init__()
        checks = [
            ("target_reduction", self.target_reduction > 1, "a number above 1"),
            ("window", self.window > 0, "a number above 0"),
            ("recalibration_batches", self.recalibration_batches >= 1, "a whole number from 1"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "a whole number from 1"),
            ("seed", self.seed >= 0, "a whole number from 0"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ConfigError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")


@dataclass(frozen=True)
class Found:
    """The best network. gpu_hours: of the search, wall seconds times ranks, killed attempts included."""

    widths: dict[str, int]
    top1: float
    flops_reduction: float
    judged: int
    gpu_hours: float


def search_widths(
    checkpoint: Path,
    out: Path,
    options: SearchOptions,
    world: World,
    ledger: Ledger,
    data_path: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """Search, or go on with a search, and write the best widths to `out`: group -> channels, as `model.widths` takes.

    checkpoint: of a run with prune.method: meta_pruning. ledger: of this process. data_path: in place of the run's own.
    say: is given a line after each generation, on rank 0. All ranks call it. Raises train/world.py's USER_ERRORS.
    """
    source = world.on_every_rank(lambda: _load(checkpoint, options, data_path))
    with ExitStack() as opened:
        judge = world.on_every_rank(lambda: _Judge(source, options, world))
        opened.callback(judge.close)
        identity = _identity(source, options)
        log = world.on_every_rank(lambda: _SearchLog(out, identity, ledger) if world.is_main else None)
        if log is not None:
            opened.callback(log.close)
        known = world.on_rank_zero(lambda: log.candidates)
        scorer = _Scorer(judge, known, log, world, say)
        widths, top1 = cup.evolve(judge.space, options, options.seed, scorer.score)
        found = Found(widths, top1, judge.reduction(widths), scorer.judged, gpu_hours=0.0)
        return replace(found, gpu_hours=world.on_rank_zero(lambda: log.finish(out, found)))


@dataclass(frozen=True)
class _Source:
    """What a run of the first stage left. content: of its checkpoint. config: its own, with the search's batches."""

    content: dict[str, Any]
    config: RunConfig


def _load(checkpoint: Path, options: SearchOptions, data_path: str | None) -> _Source:
    content = load_checkpoint(checkpoint)
    if not holds_pruning_net(content) or content["config"] is None:
        raise ConfigError(f"{checkpoint} holds no PruningNet: train one with --prune.method meta_pruning")
    config = content["config"]
    changes = {"path": data_path, "batch_size": options.batch_size}
    data = config["data"] | {key: value for key, value in changes.items() if value is not None}
    return _Source(content, config_from_dict(config | {"data": data}))


def _identity(source: _Source, options: SearchOptions) -> dict[str, Any]:
    """What decides the outcome, and must be equal for a search to go on."""
    progress = source.content["progress"]
    return {
        "run_id": source.content["run_id"],
        "step": progress["step"],
        "batch_size": source.config.data.batch_size,
        **{key: value for key, value in asdict(options).items() if key != "batch_size"},
    }


class _SearchLog:
    """OUT.search.jsonl on rank 0: what is sought, a line for each network that was judged, and at last what it took."""

    def __init__(self, out: Path, identity: dict[str, Any], ledger: Ledger) -> None:
        """Raises ConfigError if another search is there, TrainError where it cannot be read or written."""
        self.path, self._ledger = out.with_name(out.stem + ".search.jsonl"), ledger
        self._alive = self.path.with_name(self.path.name + ".alive")
        before = read_log(self.path) if self.path.exists() else []
        if before and (different := differing_keys(identity, before[0].get("search", {}))):
            raise ConfigError(
                f"{self.path} holds another search: {', '.join(different)}; take the same settings to finish it, or "
                "another --out"
            )
        self.candidates = [event for event in before if event["event"] == "candidate"]
        alive, _ = read_alive(self._alive)
        spent = [(event["time_s"], event["rank_s"]) for event in before]
        spent += [(alive["wall_s"], alive["rank_s"])] if alive else []
        ledger.add_lost(*max(spent, default=(0.0, 0.0)))
        self._done = next((event for event in before if event["event"] == "done"), None)
        try:
            self._lines = JsonLines(self.path, _whole_lines)
        except OSError as error:
            raise TrainError(f"cannot write {self.path}: {why_unwritten(error, self.path)}") from error
        if not before:
            self.write("search", {"search": identity})
        self._beat = Beat(lambda: write_alive(self._alive, ledger))

    def write(self, event: str, values: dict[str, Any]) -> None:
        time_s, rank_s = self._ledger.elapsed()
        try:
            self._lines.write({"event": event, "time_s": time_s, "rank_s": rank_s, **values})
        except OSError as error:
            raise TrainError(f"cannot write {self.path}: {why_unwritten(error, self.path)}") from error

    def finish(self, out: Path, found: Found) -> float:
        """Write the widths, and the closing line unless it is there; the hours that the search took."""
        try:
            write_durably(out, (json.dumps(found.widths, indent=1) + "\n").encode())
        except OSError as error:
            raise TrainError(f"cannot write {out}: {why_unwritten(error, out)}") from error
        if self._done is None:
            self._done = {**asdict(found), "gpu_hours": self._ledger.elapsed()[1] / 3600}
            self.write("done", self._done)
        return self._done["gpu_hours"]

    def close(self) -> None:
        self._beat.stop()
        self._lines.close()
        if self._done is not None:
            with suppress(OSError):
                self._alive.unlink(missing_ok=True)


def _whole_lines(found: bytes) -> bytes:
    """Without a last line that a kill cut short."""
    return found[: found.rfind(b"\n") + 1]


class _Scorer:
    """Scores a generation: what the log knows is not judged again, the rest is shared among the ranks."""

    def __init__(
        self,
        judge: "_Judge",
        known: list[dict[str, Any]],
        log: _SearchLog | None,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        self._judge, self._log, self._world, self._say = judge, log, world, say
        self._top1 = {_key(event["widths"]): event["top1"] for event in known}
        self._best = 0.0
        self.judged = 0

    def score(self, generation: int, networks: list[dict[str, int]]) -> list[float]:
        """Top-1 of each, percent. All ranks call it with the same networks."""
        world = self._world
        new = [widths for widths in networks if _key(widths) not in self._top1]
        for first in range(0, len(new), world.size):
            some = new[first : first + world.size]
            own = some[world.rank] if world.rank < len(some) else None
            judged = world.on_every_rank(lambda own=own: None if own is None else self._judge.top1(own))
            for widths, top1 in zip(some, world.all_gather(judged), strict=False):
                self._note(generation, widths, top1)
        scores = [self._top1[_key(widths)] for widths in networks]
        self.judged += len(networks)
        self._best = max(self._best, *scores)
        if world.is_main:
            self._say(f"generation {generation}: {len(networks)} networks, best top-1 so far {self._best:.2f}%")
        return scores

    def _note(self, generation: int, widths: dict[str, int], top1: float) -> None:
        self._top1[_key(widths)] = top1
        reduction = self._judge.reduction(widths)
        event = {"generation": generation, "widths": widths, "top1": top1, "flops_reduction": reduction}
        self._world.on_every_rank(lambda: self._log and self._log.write("candidate", event))


def _key(widths: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(widths.items()))


class _Judge:
    """Judges networks on one rank, each as an ordinary narrow network with the weights that the PruningNet has for it.

    space: the networks to choose from.
    """

    def __init__(self, source: _Source, options: SearchOptions, world: World) -> None:
        config, content = source.config, source.content
        architecture = stored_architecture(content)
        self._full = build_model(architecture.name, architecture.num_classes)
        self._groups = cup.channel_groups(self._full, architecture.example_input())
        self._dense = cup.complexity(self._full, architecture.example_input())
        self._flops = FlopsByWidths(self._full, self._groups, self._dense)
        self._alone = World(rank=0, size=1, local_rank=0, local_size=1, device=world.device)
        self._pruning_net = self._build_pruning_net(config, content)
        self.space = self._build_space(config, options)
        self._precision = Precision(config.train.precision, world.device)
        torch.backends.cudnn.deterministic = True  # so that a network that is judged again gets the same answer
        self._recalibration, self._held_out = build_search_loaders(
            config.data,
            recalibration_batches=options.recalibration_batches,
            device=world.device,
            seed=config.run.seed,
            local_world_size=world.local_size,
            classes=content["classes"],
        )

    def reduction(self, widths: dict[str, int]) -> float:
        return self._dense.flops / self._flops_at(widths)

    def top1(self, widths: dict[str, int]) -> float:
        """Percent of the held-out images, exact, after batch norm has been recalibrated."""
        network = copy.deepcopy(self._full)
        cup.apply_plan(network, cup.plan_first_channels(self._groups, widths), self._groups)
        network.to(self._alone.device, memory_format=MEMORY_FORMAT)
        self._pruning_net.fill(network, widths)
        recalibrate(network.eval(), self._recalibration, self._precision)
        return evaluate(network, self._held_out, self._precision, self._alone).top1

    def close(self) -> None:
        self._recalibration.close()
        self._held_out.close()

    def _build_pruning_net(self, config: RunConfig, content: dict[str, Any]) -> PruningNet:
        pruning_net = build_pruning_net(copy.deepcopy(self._full), self._groups, config.prune, config.run.seed)
        try:
            load_weights(pruning_net, stored_weights(content))
        except CheckpointError as error:
            raise CheckpointError(f"the PruningNet cannot be read: {error}") from error
        return pruning_net.to(self._alone.device, memory_format=MEMORY_FORMAT)

    def _build_space(self, config: RunConfig, options: SearchOptions) -> WidthSpace:
        prune, meta = config.prune, config.prune.meta_pruning
        searched = cup.prunable_groups(self._groups, prune.scope)
        widths = widths_at_scales(searched, meta.narrowest, meta.scales, prune.plan_options())
        most = self._dense.flops / options.target_reduction
        allowed = {name: sorted(set(some)) for name, some in widths.items()}
        return WidthSpace(allowed, self._flops_at, (most / (1 + options.window), most))

    def _flops_at(self, widths: dict[str, int]) -> int:
        return self._flops.after({name: range(width) for name, width in widths.items()})
