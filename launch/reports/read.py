"""Run directories -> what their logs say, and which runs are repetitions of each other."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from train.errors import TrainError
from train.log.rundir import RunDir, read_log
from train.renamed import with_new_names

# Name, place, seed and saving of a run: runs that differ in nothing else are repetitions. (Devices are compared apart.)
NAMING = "run."

# A saving is a difference of hours, so everything else that decides hours must be the same: what the log says ...
COMPARABLE = ("model", "epochs", "batch_size", "train_images", "precision", "loader", "world_size", "devices")
# ... and the settings that begin so. What the optimizer is told costs no time, yet decides accuracy.
HOURS_SETTINGS = ("data.", "train.", "optim.name")
ACCURACY_SETTINGS = ("data.", "train.", "optim.", "model.weights", "model.head_lr")

# What the report reads of every line of a kind, in logs of all versions.
NEEDED = {
    "run": ("method", "shrinks", *COMPARABLE),
    "epoch": ("epoch", "flops_reduction", "gpu_hours", "images_per_s", "seconds", "threshold", "top1", "widths"),
    "resize": ("epoch", "flops_reduction_after", "flops_reduction_before", "removed", "seconds", "threshold"),
    "done": ("device", "flops_reduction", "gpu_hours", "top1", "top5"),
}


@dataclass(frozen=True)
class Run:
    """What a log says of one finished run. `starts` are its run events, one a process; `done` is its closing one."""

    name: str
    directory: Path
    starts: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    resizes: list[dict[str, Any]]
    done: dict[str, Any]

    @property
    def first(self) -> dict[str, Any]:
        """The run event that it began with."""
        return self.starts[0]

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted key -> value of the resolved configuration; empty for an older log, which lacks it.

        Those of `prune` that a run does not use are left out, so that dense runs are equal whatever they say.
        """
        flat = _flat(with_new_names(self.first.get("config") or {})[0])
        if flat:
            flat.setdefault("data.val_size", None)  # as versions before it did
        used = ["prune.method"] if self.first["narrowed"] is None else ["prune.method", "prune.scope"]
        return {key: flat[key] for key in flat if self.shrinks or not key.startswith("prune.") or key in used}

    @property
    def seed(self) -> int | None:
        return self.settings.get("run.seed")

    @property
    def network(self) -> str:
        return self.first["model"]

    @property
    def data(self) -> str | None:
        """Name of the data set: the folder it lies in."""
        path = self.settings.get("data.path")
        return "synthetic" if self.first["loader"] == "synthetic" else path and Path(path).name

    @property
    def validated_at(self) -> str:
        """What to say behind its images, where those of validation are not as large as those of training in the end."""
        size = self.first.get("val_size")
        return "" if size in (None, self.epochs[-1].get("image_size")) else f", validated at {size} pixels"

    @property
    def shrinks(self) -> bool:
        return self.first["shrinks"]

    @property
    def is_dense(self) -> bool:
        """Whether savings and drops can be measured against it: it began full and stayed so."""
        return not self.shrinks and self.first["from"] is None and self.first["narrowed"] is None

    @property
    def method(self) -> str:
        narrowed = self.first["narrowed"]
        if not self.shrinks:
            return narrowed or ("dense" if self.is_dense else "retrained")
        name = self.first["method"] + (f", {narrowed}" if narrowed else "")
        return name if self.first["from"] is None else f"{name} on a cut network"

    @property
    def hours(self) -> float:
        """GPU hours (ranks x wall time on a CPU run), those known of the training that it started from included."""
        return self.done["gpu_hours"] + (self.first["gpu_hours_before"] or 0.0)

    @property
    def hours_are_known(self) -> bool:
        return self.first["gpu_hours_before"] is not None

    @property
    def conditions(self) -> tuple[Any, ...]:
        """A run that was resumed on other machines has all of theirs, so that it is like no other one."""
        return tuple(" then ".join(dict.fromkeys(str(start[key]) for start in self.starts)) for key in COMPARABLE)

    def differences(self, other: "Run", *, accuracy: bool = False) -> list[str]:
        """What besides shrinking could make a difference of hours, with `accuracy` of accuracy: keys with two values.

        None of it is a seed, a name or a place. What one log lacks is no difference.
        """
        ours, theirs = self.settings, other.settings
        prefixes = ACCURACY_SETTINGS if accuracy else HOURS_SETTINGS
        conditions = zip(COMPARABLE, self.conditions, other.conditions, strict=True)
        found = [key for key, one, another in conditions if one != another]
        shared = [key for key in ours if key in theirs and key.startswith(prefixes)]
        return found + [key for key in shared if ours[key] != theirs[key]]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds and names, at least one."""

    name: str
    runs: tuple[Run, ...]

    @property
    def one(self) -> Run:
        """A run that stands for all of them."""
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs if run.seed is not None]


def read_runs(directories: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs among these, and a note for each other one. Raises TrainError where no run is finished."""
    runs, notes, errors = [], [], []
    for directory in directories:
        try:
            runs.append(read_run(directory))
        except TrainError as error:
            errors.append(error)
            notes.append(f"left out: {error}")
    if not runs:
        raise errors[0]
    return runs, notes


def read_run(directory: Path) -> Run:
    """Raises TrainError if the directory holds no finished run, or its log lacks what a report needs."""
    log = RunDir(directory).log
    if not log.exists():
        raise TrainError(f"{directory} is no run directory: it has no {log.name}")
    events = read_log(log)
    by_kind = {kind: [e for e in events if e.get("event") == kind] for kind in NEEDED}
    by_kind["run"] = [_with_todays_keys(start) for start in by_kind["run"]]
    if not by_kind["run"]:
        raise TrainError(f"{log} tells of no run: the file is empty, damaged or no log of launch/train.py")
    for kind, lines in by_kind.items():
        if missing := [key for key in NEEDED[kind] for line in lines if key not in line]:
            raise TrainError(f"{log}: an event {kind!r} has no {missing[0]!r}; damaged, or no log of launch/train.py")
    if not by_kind["done"]:
        raise TrainError(f"the run in {directory} is not finished: start it again with the same command, it will go on")
    if not by_kind["epoch"]:
        raise TrainError(f"{log} tells of no epoch: the file is damaged")
    return Run(
        directory.resolve().name, directory, by_kind["run"], by_kind["epoch"], by_kind["resize"], by_kind["done"][-1]
    )


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Repetitions together, dense ones first, else in the order given. A run whose log lacks its settings is alone."""
    members: dict[Any, list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.is_dense):
        settings = {key: value for key, value in run.settings.items() if not key.startswith(NAMING)}
        key = (repr(sorted(settings.items())), run.conditions) if settings else run.directory
        members.setdefault(key, []).append(run)
    groups = [tuple(group) for group in members.values()]
    # The shortest names that tell the groups apart: what the runs' names share, a run's name, its directory.
    for name in (_common_name, lambda group: group[0].name, lambda group: str(group[0].directory)):
        names = [name(group) for group in groups]
        if len(set(names)) == len(names):
            break
    return [Group(name, group) for name, group in zip(names, groups, strict=True)]


def differing_settings(groups: list[Group]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each group, where groups that have the setting differ; None for those without it."""
    settings = [group.one.settings for group in groups]
    keys = dict.fromkeys(key for one in settings for key in one if not key.startswith(NAMING))
    found = {key: [one[key] for one in settings if key in one] for key in keys}
    differing = [key for key, values in found.items() if any(value != values[0] for value in values)]
    return {key: [one.get(key) for one in settings] for key in differing}


def _with_todays_keys(start: dict[str, Any]) -> dict[str, Any]:
    """A run event, of an older log, too: those knew CUP-SS alone, the oldest no run that started from another."""
    older = {"from": None, "narrowed": None, "gpu_hours_before": 0.0}
    if "cup" in start:
        is_reset = ((start.get("config") or {}).get("cup") or {}).get("momentum") == "reset"
        older |= {"shrinks": start["cup"], "method": "CUP-SS (momentum reset)" if is_reset else "CUP-SS"}
    return older | start


def _common_name(runs: Sequence[Run]) -> str:
    """c10_cup_s0, c10_cup_s1 -> c10_cup; a run alone keeps its name."""
    first = runs[0].name
    if len(runs) == 1:
        return first
    common = takewhile(lambda letters: len(set(letters)) == 1, zip(*(run.name for run in runs), strict=False))
    prefix = "".join(letters[0] for letters in common)
    return re.sub(r"[-_.](s|seed)?[-_.]?\d*$", "", prefix) or first


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
