"""A grid -> its runs: the configuration of each, and which ones it needs finished first."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from launch.grids.grid import DENSE, Entry, Grid, Settings
from train.config import ModelConfig, RunConfig, parse_config
from train.errors import ConfigError
from train.methods import PruneConfig

TO_A_TARGET = ("cut", "search", "thin")
MADE_OF_ITS_COST = ("cut", "search")
"""Kinds that cost what the run that they need did, too."""
FROM_SCRATCH = ("search", "thin", "shape")
"""Kinds that begin at widths of their own, with fresh weights."""
STAYS_AS_IT_IS = ("cut", "search", "thin", "shape", "equal_hours")
"""Kinds whose training cuts nothing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a grid, with what comes before it.

    config: as the grid's file gives it; what follows from other runs (stages.py) is not in it yet.
    options: its settings of `prune` before kinds that cut nothing while they train lost them: for a cut, for widths.
    needs: jobs that must be finished first. setting: "" where it makes no difference.
    """

    name: str
    entry: Entry
    setting: str
    seed: int
    config: RunConfig
    options: PruneConfig
    needs: tuple[str, ...]


def plan_jobs(grid: Grid) -> dict[str, Job]:
    """Name -> job, each after those that it needs; a seed's jobs come together, so that a table fills seed by seed.

    Raises ConfigError for settings that launch/train.py would refuse.
    """
    ordered = sorted(grid.entries.values(), key=lambda entry: (entry.name != DENSE, entry.of is not None))
    parsed = {(entry.name, setting): _parse(grid, entry, setting) for entry in ordered for setting in grid.settings}
    if pruning := [one.prune.method for (name, _), one in parsed.items() if name == DENSE and one.prune.shrinks]:
        raise ConfigError(f"{grid.path}, {DENSE}: prune.method: found {pruning[0]}, allowed here: none")
    jobs: dict[str, Job] = {}
    for seed in grid.seeds:
        for setting in grid.settings:
            for entry in ordered:
                job = _job(grid, entry, setting, seed, parsed)
                other = jobs.setdefault(job.name, job)
                if (other.entry, other.setting) != (job.entry, job.setting):
                    raise ConfigError(
                        f"{grid.path}: two runs would be called {job.name}: give one of them another name"
                    )
    return jobs


def _job(grid: Grid, entry: Entry, setting: str, seed: int, parsed: Mapping[tuple[str, str], RunConfig]) -> Job:
    asked = parsed[entry.name, setting]
    own_setting = setting if _depends(grid, entry, asked) else ""
    name = _run_name(entry, own_setting, seed)
    run = replace(asked.run, name=name, root=str(grid.out / "runs"), seed=seed)
    prune = asked.prune
    if entry.kind in STAYS_AS_IT_IS or not prune.shrinks:
        prune = PruneConfig(method="none", scope=prune.scope)
    needed = {"cut": [DENSE], "equal_hours": [entry.network]}.get(entry.kind, [])
    needed += [entry.of] if entry.kind in ("search", "shape", "equal_hours") and entry.of is not None else []
    return Job(
        name=name,
        entry=entry,
        setting=own_setting,
        seed=seed,
        config=replace(asked, run=run, prune=prune),
        options=asked.prune,
        needs=tuple(_name_of(grid, grid.entries[one], setting, seed, parsed) for one in needed),
    )


def _name_of(grid: Grid, entry: Entry, setting: str, seed: int, parsed: Mapping[tuple[str, str], RunConfig]) -> str:
    return _run_name(entry, setting if _depends(grid, entry, parsed[entry.name, setting]) else "", seed)


def _run_name(entry: Entry, setting: str, seed: int) -> str:
    return "_".join(filter(None, [entry.name, setting, f"s{seed}"]))


def _depends(grid: Grid, entry: Entry, asked: RunConfig) -> bool:
    """Whether a run differs from setting to setting: a dense one does not where these say how far to prune."""
    if entry.kind != "train" or asked.prune.shrinks:
        return True
    return not all(key.startswith("prune.") for setting in grid.settings.values() for key in setting)


def _parse(grid: Grid, entry: Entry, setting: str) -> RunConfig:
    settings = grid.common | grid.own_settings(entry, setting)
    try:
        config = parse_config(["--config", str(grid.base), *arguments(settings)], "launch/train.py", str(grid.base))
    except ConfigError as error:
        raise ConfigError(f"{grid.path}, {entry.name}: {error}") from error
    if entry.kind in TO_A_TARGET and config.prune.target_reduction is None:
        raise ConfigError(
            f"{grid.path}, {entry.name}: found no prune.target_reduction, allowed with kind {entry.kind}: a number "
            "above 1, in set or in settings"
        )
    if entry.kind in TO_A_TARGET and config.prune.round_to == "measured":
        raise ConfigError(f"{grid.path}, {entry.name}: prune.round_to: found measured, allowed here: a whole number")
    if entry.kind == "cut":
        _require_known_to_a_cut(config.prune, f"{grid.path}, {entry.name}")
    if entry.kind in FROM_SCRATCH:
        _require_full_and_fresh(config.model, f"{grid.path}, {entry.name}")
    return config


def _require_known_to_a_cut(prune: PruneConfig, place: str) -> None:
    default = PruneConfig()
    for name in ("fold", "use_bias", "sequential"):
        found, allowed = getattr(prune, name), getattr(default, name)
        if found != allowed:
            raise ConfigError(
                f"{place}: prune.{name}: found {json.dumps(found)}, allowed with kind cut: {json.dumps(allowed)}, for "
                "launch/prune.py has no such option"
            )


def _require_full_and_fresh(model: ModelConfig, place: str) -> None:
    """Widths go with fresh weights alone."""
    default = ModelConfig()
    for name in ("checkpoint", "weights", "width"):
        found, allowed = getattr(model, name), getattr(default, name)
        if found != allowed:
            raise ConfigError(
                f"{place}: model.{name}: found {found!r}, allowed with a kind that trains from scratch: "
                f"{json.dumps(allowed)}, with model.name beside it"
            )


def arguments(settings: Settings) -> list[str]:
    """The command line of launch/train.py for these settings."""
    return [text for key, value in settings.items() for text in (f"--{key}", _as_text(value))]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
