"""The file of a comparison: methods and controls, settings, seeds.

    base: ../resnet20_cifar10.yaml      # recipe of every run; relative to this file
    set: {prune.method: none}           # what all runs change in it
    seeds: [0, 1, 2]
    settings:                           # the whole comparison is made at each of these
      fr2: {prune.target_reduction: 2.0}
    before:                             # runs that others are made from, in no table
      pruning_net: {prune.method: meta_pruning}
    methods:
      meta_pruning: {kind: search, of: pruning_net, command: "...", published: MetaPruning}
      cup_ss: {prune.method: hard_ramp, published: CUP-RF}
      cup: {kind: cut, prune.criterion: cup, published: CUP}
    controls:
      dense: {}
      thin: {kind: thin}
      shape: {kind: shape, of: cup_ss}

An entry holds settings of launch/train.py and these words:

kind: how it is made, one of KINDS. of: the method that a control belongs to, or several, each with one of its own; the
run that a search reads. network: of kind equal_hours. published: what the authors' slides call it. command: of kind
search.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from launch.reports.published import DROPS
from train.errors import ConfigError
from train.files import read_bounded
from train.log.rundir import NAME

Kind = Literal["train", "cut", "search", "thin", "shape", "same_schedule", "equal_hours"]
"""train: one run.
cut: the dense run of the same seed, cut once to prune.target_reduction by prune.criterion, then trained again.
search: a command writes a file of widths, which are trained from scratch; it may read a run, `of`.
thin: a uniformly thinner network, prune.target_reduction of the FLOPs, from the first step.
shape: the widths that the method `of` ended with, from scratch.
same_schedule: the method `of` with other settings, such as another criterion.
equal_hours: the run `network`, dense or a thin one, in as many epochs as cost what the method `of` did."""
KINDS = get_args(Kind)
OF_A_METHOD = ("shape", "same_schedule", "equal_hours")
RETRAINED = ("cut", "search")
"""Kinds whose network is trained again after it got its shape: the slides' table with retraining."""
DENSE = "dense"
"""The entry against which savings are measured, and which is cut."""
MAX_BYTES = 1 << 20
TOP = ("base", "out", "set", "seeds", "settings", "before", "methods", "controls")
WORDS = ("kind", "of", "network", "published", "command")
COMMAND_EXAMPLE = {
    "python": "python",
    "launch": "launch",
    "run": "run",
    "config": "run.yaml",
    "reduction": 2.0,
    "seed": 0,
    "out": "out.json",
}
"""What a command may have in braces, with values of the types that it will get."""
SECTIONS = ("run", "model", "data", "optim", "train", "prune")
OWN = tuple(f"run.{name}" for name in ("name", "root", "seed", "resume"))
"""Settings that follow from the grid."""

Role = Literal["before", "method", "control"]
"""before: a run that others are made from, and nothing else."""
Settings = dict[str, Any]
"""Dotted key -> value."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method or a control. settings: what it changes in the base recipe and `set`."""

    name: str
    kind: Kind = "train"
    of: str | None = None
    network: str = DENSE
    settings: Settings = field(default_factory=dict)
    role: Role = "method"
    published: str | None = None
    command: str | None = None

    @property
    def is_control(self) -> bool:
        return self.role == "control"

    @property
    def is_retrained(self) -> bool:
        return self.kind in RETRAINED


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A comparison. base: recipe. out: folder of everything that it makes. settings: name -> what it changes."""

    path: Path
    base: Path
    out: Path
    common: Settings
    seeds: tuple[int, ...]
    settings: dict[str, Settings]
    entries: dict[str, Entry]

    @property
    def methods(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.role == "method"]

    @property
    def controls(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.is_control]

    def own_settings(self, entry: Entry, setting: str) -> Settings:
        """What an entry's run sets over `common`."""
        of: Settings = {}
        if entry.kind == "same_schedule":
            of = self.entries[entry.of].settings
        elif entry.kind == "equal_hours":
            of = self.entries[entry.network].settings
        return self.settings[setting] | of | entry.settings


def read_grid(path: Path, changes: Sequence[str] = (), out: Path | None = None) -> Grid:
    """changes: KEY=VALUE, over the file's `set`. out: in place of the file's.

    Raises ConfigError for a file that is none of a comparison.
    """
    try:
        content = yaml.safe_load(read_bounded(path, MAX_BYTES).decode())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    try:
        grid = _grid(path, content, changes)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: found a mapping that holds itself, by an alias, allowed: none") from error
    return grid if out is None else replace(grid, out=out)


def overridden(grid: Grid, changes: Sequence[str]) -> list[str]:
    """The keys of the changes that were given to `read_grid` and that every run sets otherwise."""
    own = [grid.own_settings(entry, setting) for entry in grid.entries.values() for setting in grid.settings]
    return [key for key in _changes(changes) if all(key in settings for settings in own)]


def _grid(path: Path, content: Any, changes: Sequence[str]) -> Grid:
    """Raises ValueError, its message without the file's name."""
    content = _mapping(content, "the file")
    _require_known(content, TOP, "")
    if not isinstance(content.get("base"), str):
        raise ValueError(f"base: found {content.get('base')!r}, allowed: a recipe, relative to this file")
    entries = [
        *_entries(content.get("before"), "before", "before"),
        *_entries(content.get("methods"), "methods", "method"),
        *_entries(content.get("controls"), "controls", "control"),
    ]
    entries.sort(key=lambda entry: entry.name != DENSE)
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) < len(entries):
        names = [entry.name for entry in entries]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)}: there twice, allowed: once")
    _require_controls(by_name)
    settings = _mapping(content.get("settings") or {}, "settings")
    _require_text(content, ["out"], "")
    return Grid(
        path=path,
        base=path.parent / content["base"],
        out=Path(content.get("out") or f"runs/compare/{path.stem}"),
        common=_flat(_mapping(content.get("set", {}), "set"), "set") | _changes(changes),
        seeds=_seeds(content.get("seeds", [0, 1, 2])),
        settings={
            _name(name, "settings"): _flat(_mapping(one, name), f"settings.{name}") for name, one in settings.items()
        }
        or {"": {}},
        entries=by_name,
    )


def _entries(content: Any, where: str, role: Role) -> list[Entry]:
    entries = []
    for name, values in _mapping({} if content is None else content, where).items():
        place = f"{where}.{name}"
        values = _mapping({} if values is None else values, place)
        words = {key: values[key] for key in WORDS if key in values}
        _require_text(words, ["network", "published", "command"], f"{place}.")
        _require_published(words, place)
        settings = _flat({key: value for key, value in values.items() if key not in WORDS}, place)
        entry = Entry(name=_name(name, where), settings=settings, role=role, **(words | {"of": None}))
        _require_consistent(entry, words, place)
        of = words.get("of")
        if isinstance(of, list):
            entries += [replace(entry, name=f"{entry.name}_of_{_name(one, place)}", of=one) for one in of]
        else:
            entries.append(replace(entry, of=of))
    return entries


def command_words(command: str, known: Mapping[str, Any]) -> list[str]:
    """The words of a command line with what stands in braces put in; ValueError for a line that cannot be read."""
    try:
        words = [word.format(**known) for word in shlex.split(command)]
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        allowed = ", ".join(f"{{{name}}}" for name in known)
        raise ValueError(f"command: found {command!r} ({error}), allowed in braces: {allowed}") from error
    if not words:
        raise ValueError(f"command: found {command!r}, allowed: a command line")
    return words


def _require_consistent(entry: Entry, words: Settings, place: str) -> None:
    if entry.kind not in KINDS:
        raise ValueError(f"{place}.kind: found {entry.kind!r}, allowed: {', '.join(KINDS)}")
    if entry.role == "before" and entry.kind != "train":
        raise ValueError(f"{place}.kind: found {entry.kind}, allowed here: train")
    of = words.get("of")
    if not (of is None or _is_text(of) or (isinstance(of, list) and of and all(map(_is_text, of)))):
        raise ValueError(f"{place}.of: found {of!r}, allowed: a name, or a list of names")
    if entry.kind != "search" and bool(words.get("of")) != (entry.kind in OF_A_METHOD):
        needed = "a method's name, or a list of names" if entry.kind in OF_A_METHOD else "nothing"
        raise ValueError(f"{place}.of: found {words.get('of')!r}, allowed with kind {entry.kind}: {needed}")
    if "network" in words and entry.kind != "equal_hours":
        raise ValueError(f"{place}.network: found {entry.network!r}, allowed with kind {entry.kind}: nothing")
    if (entry.command is not None) != (entry.kind == "search"):
        needed = "a command line" if entry.kind == "search" else "nothing"
        raise ValueError(f"{place}.command: found {entry.command!r}, allowed with kind {entry.kind}: {needed}")
    if entry.command is not None:
        try:
            command_words(entry.command, COMMAND_EXAMPLE)
        except ValueError as error:
            raise ValueError(f"{place}.{error}") from error


def _require_controls(entries: Mapping[str, Entry]) -> None:
    dense = entries.get(DENSE)
    if dense is None or dense.kind != "train" or not dense.is_control:
        raise ValueError(
            f"controls: found no {DENSE}, allowed: an entry {DENSE}: {{}}, which the others are measured against"
        )
    methods, before = ([n for n, entry in entries.items() if entry.role == role] for role in ("method", "before"))
    if not methods:
        raise ValueError("methods: found none, allowed: names with their settings")
    networks = [DENSE, *(name for name, entry in entries.items() if entry.kind == "thin")]
    for name, entry in entries.items():
        if entry.network not in networks:
            allowed = ", ".join(networks)
            raise ValueError(f"{name}.network: found {entry.network!r}, allowed: {allowed} (dense, or of kind thin)")
        allowed = before if entry.kind == "search" else methods
        if entry.of is not None and entry.of not in allowed:
            raise ValueError(f"{name}.of: found {entry.of!r}, allowed: {', '.join(allowed) or 'an entry of before'}")
        if entry.kind == "same_schedule" and entries[entry.of].kind not in (*OF_A_METHOD, "train"):
            raise ValueError(
                f"{name}.of: found {entry.of}, of kind {entries[entry.of].kind}, which cuts nothing while it trains; "
                "allowed: a method of kind train; for a cut, the control is {kind: cut, prune.criterion: random}"
            )
        if entry.of is not None and entries[entry.of].kind in OF_A_METHOD:
            raise ValueError(
                f"{name}.of: found {entry.of}, which is made from another method; allowed: one that is not"
            )


def _seeds(found: Any) -> tuple[int, ...]:
    ok = isinstance(found, list) and found and all(type(seed) is int and 0 <= seed < 2**32 for seed in found)
    if not ok:
        raise ValueError(f"seeds: found {found!r}, allowed: a list of whole numbers from 0, below 2**32")
    if len(set(found)) < len(found):
        raise ValueError(f"seeds: found {found}, allowed: each once, for a seed's second run trains the same network")
    return tuple(found)


def _changes(texts: Sequence[str]) -> Settings:
    changed = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set: found {text!r}, allowed: KEY=VALUE, such as data.path=datasets/cifar10")
        try:
            changed |= _flat({key: yaml.safe_load(value)}, "--set")
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"--set: found {text!r}, whose value is no YAML, allowed: KEY=VALUE") from error
    return changed


def _flat(values: Mapping[str, Any], place: str) -> Settings:
    """Nested or dotted settings, dotted."""
    flat: Settings = {}
    for key, value in _nested_keys(values):
        if key.split(".")[0] not in SECTIONS or "." not in key:
            allowed = ", ".join(f"{section}.*" for section in SECTIONS)
            raise ValueError(f"{place}: found {key}, allowed: {allowed}, and in an entry {', '.join(WORDS)}")
        if key in OWN:
            raise ValueError(f"{place}: found {key}, which follows from the names and seeds of this file: leave it out")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:  # a date, a set, bytes, a list that holds itself by an alias
            raise ValueError(
                f"{place}: {key}: found {value!r}, allowed: text (a date in quotes), numbers, true, false, null, lists"
            ) from error
        flat[key] = value
    return flat


def _nested_keys(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _nested_keys(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def _mapping(found: Any, what: str) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{what}: found {found!r}, allowed: names, each with a value")
    return found


def _name(found: str, where: str) -> str:
    if not re.fullmatch(NAME, found):
        raise ValueError(f"{where}: found the name {found!r}, allowed: letters, digits, '.', '_' and '-'")
    return found


def _is_text(found: Any) -> bool:
    return isinstance(found, str) and found != ""


def _require_text(values: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """Of those keys that are there."""
    for key in keys:
        if key in values and not _is_text(values[key]):
            raise ValueError(f"{where}{key}: found {values[key]!r}, allowed: text")


def _require_published(words: Mapping[str, Any], place: str) -> None:
    known = sorted({result.method for result in DROPS.results})
    if words.get("published", known[0]) not in known:
        raise ValueError(f"{place}.published: found {words['published']!r}, allowed: {', '.join(known)}")


def _require_known(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where}{unknown[0]}: unknown, allowed: {', '.join(known)}")
