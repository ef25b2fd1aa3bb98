"""The configuration of a run: the owners' dataclasses put together, parsed and validated before anything else exists.

Precedence, last wins: defaults in the dataclasses, the YAML file, dotted overrides on the command line. An error is one
line that names the key, the value found and what is allowed.
"""

import dataclasses
import difflib
import keyword
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from data import DataConfig
from data.batch import DECODING_ON_GPU, ON_DISK
from train.errors import ConfigError
from train.loop.engine import TrainConfig
from train.network.models import check_model_name
from train.network.optim import OptimConfig
from train.resizer import CupConfig

# Settings of `data` that only some loaders, devices or other settings give an effect.
RANDAUGMENT = ("randaugment_ops", "randaugment_magnitude")
AUGMENTING = ("crop_scale", "crop_ratio", "flip", "color_jitter", "auto_augment", *RANDAUGMENT)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run as a whole: its place, its seed, its device."""

    name: str = "run"
    """Name of the run; its directory is ROOT/NAME."""
    root: str = "runs"
    """Where run directories lie."""
    resume: Literal["auto", "never"] = "auto"
    """auto = go on with an unfinished run of this name and configuration, leave a finished one alone and take the next
    free number (NAME-2, ...); never = always take a new directory."""
    seed: int = 0
    """Seed of initial weights, order of images and augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = a GPU a rank where there are any, else the CPU."""
    save_every_minutes: float = 10.0
    """Minutes between two checkpoints in the middle of an epoch; there is one at each epoch's end anyway. 0 = only
    there."""
    keep: int = 3
    """How many checkpoints stay: last.pt, and those before it as last-1.pt, last-2.pt."""
    timeout_minutes: float = 10.0
    """A rank that waits longer than this for the others gives up: longer than it takes to start the ranks, or to write
    a checkpoint."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name: found {self.name!r}, allowed: letters, digits, '.', '_' and '-', no slashes")
        checks = [
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0, below 2**32"),
            ("save_every_minutes", 0 <= self.save_every_minutes < math.inf, "a number from 0"),
            ("keep", 1 <= self.keep <= 1000, "1 to 1000"),
            ("timeout_minutes", 0 < self.timeout_minutes < 1e6, "a number above 0, below 1,000,000"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: str | None = None
    """A classification model of torchvision, timm:NAME, lenet, mlp, vgg16_cifar, or resnet20_cifar (32, 44, 56).
    null = the network in model.from; resnet50 without."""
    from_: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to start from, usually one that launch/prune.py wrote: its network at its widths, with "
            "its weights; everything else begins anew. null = the full network, freshly initialised."
        },
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a name that nobody knows, ValueError for an empty file name."""
        if self.from_ == "":
            raise ValueError("from: found '', allowed: a checkpoint file, or null")
        if self.name is None and self.from_ is None:
            object.__setattr__(self, "name", "resnet50")
        if self.name is not None:
            check_model_name(self.name)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes."""

    run: RunOptions = field(default_factory=RunOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cup: CupConfig = field(default_factory=CupConfig)

    def __post_init__(self) -> None:
        """Raises ValueError for settings that are at odds with each other."""
        last = self.cup.last_epoch
        if self.cup.enabled and last is not None and last > self.train.epochs:
            raise ValueError(f"cup.last_epoch: found {last}, allowed: up to train.epochs ({self.train.epochs})")
        if self.optim.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs: found {self.optim.warmup_epochs}, allowed: up to train.epochs "
                f"({self.train.epochs})"
            )
        if self.data.start_size and self.data.grow_epochs > self.train.epochs:
            raise ValueError(
                f"data.grow_epochs: found {self.data.grow_epochs}, allowed: up to train.epochs ({self.train.epochs})"
            )

    def without_effect(self) -> list[str]:
        """What was set and changes nothing, in words for the user, a line for each reason."""
        data = self.data
        on_gpu = self.run.device == "cuda" or (self.run.device == "auto" and torch.cuda.is_available())
        rules = [
            (not self.cup.enabled, self.cup, [f.name for f in dataclasses.fields(CupConfig)][1:], "cup.enabled: false"),
            (self.cup.ramp == "reduction", self.cup, ["slope", "offset"], "cup.ramp: reduction"),
            (self.optim.schedule == "cosine", self.optim, ["milestones", "gamma"], "optim.schedule: cosine"),
            (self.optim.name == "apex_lamb", self.optim, ["momentum", "nesterov"], "optim.name: apex_lamb"),
            (self.train.compile == "none", self.train, ["compile_steps"], "train.compile: none"),
            (data.loader == "synthetic", data, [*ON_DISK, *AUGMENTING], "data.loader: synthetic"),
            (data.loader == "folder", data, ["mmap"], "data.loader: folder"),
            (data.loader == "folder" or not on_gpu, data, DECODING_ON_GPU, "no decoding on a GPU"),
            (data.loader in ("folder", "dali"), data, ["synthetic_images", "synthetic_classes"], "images from a disk"),
            (data.auto_augment != "randaugment", data, RANDAUGMENT, f"data.auto_augment: {data.auto_augment}"),
            (not data.start_size, data, ["grow_epochs", "size_step"], "data.start_size: 0"),
        ]
        names = {id(self.cup): "cup", id(self.optim): "optim", id(self.train): "train", id(self.data): "data"}
        notes = []
        for applies, section, keys, reason in rules:
            changed = [key for key in keys if getattr(section, key) != getattr(type(section)(), key)]
            if applies and changed:
                notes.append(f"no effect with {reason}: {', '.join(f'{names[id(section)]}.{key}' for key in changed)}")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, as YAML and JSON hold it."""
        return {section: _renamed(_plain(values), _key) for section, values in dataclasses.asdict(self).items()}


def build_parser(prog: str, default_config: str) -> ArgumentParser:
    """The command line: --config FILE, dotted overrides, --print_config, --help with every unit and default."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a classifier on several ranks while CUP-SS resizes it.",
        epilog=f"Without --config the recipe {default_config} is run.",
    )
    parser.add_argument("--config", action="config", help="Recipe, a YAML file; launch/configs/ holds some.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error that has one line else.")
    for section in dataclasses.fields(RunConfig):
        _add_section(parser, section)
    return parser


def parse_config(argv: list[str], prog: str, default_config: str) -> RunConfig:
    """Command line -> configuration. Raises ConfigError; --help and --print_config print and exit with 0."""
    if not any(arg == "--config" or arg.startswith("--config=") for arg in argv):
        argv = ["--config", default_config, *argv]
    try:
        namespace = build_parser(prog, default_config).parse_args(argv)
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error), argv)) from error
    values = namespace.as_dict()
    sections = {section.name: values[section.name] for section in dataclasses.fields(RunConfig)}
    return config_from_dict(sections)


def config_from_dict(values: dict[str, dict[str, Any]]) -> RunConfig:
    """Nested plain data -> configuration. Raises ConfigError for what is out of range."""
    sections = {}
    for section in dataclasses.fields(RunConfig):
        if not isinstance(values.get(section.name), dict):
            found = values.get(section.name)
            raise ConfigError(f"{section.name}: found {found!r}, allowed: settings, each a name and a value")
        try:
            named = _renamed(_tuples(values[section.name]), _field_name)
            sections[section.name] = section.default_factory(**named)
        except ValueError as error:
            raise ConfigError(f"{section.name}.{error}") from error
        except TypeError as error:
            raise ConfigError(f"{section.name}: a configuration of another version ({error})") from error
    try:
        return RunConfig(**sections)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def differing_keys(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys at which two plain configurations differ, with both values."""
    different = []
    for key in sorted({*one, *other}):
        ours, theirs, name = one.get(key), other.get(key), f"{prefix}{key}"
        if isinstance(ours, dict) and isinstance(theirs, dict):
            different += differing_keys(ours, theirs, f"{name}.")
        elif ours != theirs:
            different.append(f"{name} ({theirs!r} there, {ours!r} now)")
    return different


def _add_section(parser: ArgumentParser, section: dataclasses.Field) -> None:
    """The options of one owner's dataclass. jsonargparse cannot rename a field, so renamed ones are added by hand."""
    renamed = [f for f in _fields(section) if _key(f.name) != f.name]
    parser.add_class_arguments(section.default_factory, section.name, skip={f.name for f in renamed})
    for f in renamed:
        parser.groups[section.name].add_argument(
            f"--{section.name}.{_key(f.name)}", type=f.type, default=f.default, help=f.metadata["help"]
        )


def _key(field_name: str) -> str:
    """What the user calls a field: `from` is a keyword of Python, so the field is `from_`."""
    return field_name.removesuffix("_")


def _field_name(key: str) -> str:
    return f"{key}_" if keyword.iskeyword(key) else key


def _renamed(values: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    return {rename(key): value for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _one_line(message: str, argv: list[str]) -> str:
    """jsonargparse's message in this project's form: key, value found, what is allowed."""
    if match := re.search(
        r"Parser key \"(\w+)\.(\w+)\":.*(?:Got|Given) value:? ?(?:type: \S+)? ?(.*)", message, re.DOTALL
    ):
        section, name, found = match.groups()
        return f"{section}.{name}: found {found.strip().partition(chr(10))[0]!r}, allowed: {_allowed(section, name)}"
    if match := re.search(r"(?:Group '(.+?)' does not accept option|Option) '(.+?)'", message):
        return _unknown_key(".".join(part for part in match.groups() if part))
    if match := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
        return _unknown_key(match.group(1).split()[0].lstrip("-").split("=")[0])
    # What is left is about the recipe as a whole; jsonargparse does not always say which file that is.
    return " ".join([*message.split(), f"(command line: {' '.join(argv)})"])


def _unknown_key(key: str) -> str:
    known = [f"{section.name}.{_key(f.name)}" for section in dataclasses.fields(RunConfig) for f in _fields(section)]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    group = [name for name in known if name.split(".")[0] == key.split(".")[0]]
    allowed = ", ".join(group) if group else ", ".join(section.name + ".*" for section in dataclasses.fields(RunConfig))
    hint = f", did you mean {close[0]}?" if close else ";"
    return f"{key}: unknown key{hint} allowed: {allowed}"


def _fields(section: dataclasses.Field) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(section.default_factory())


def _allowed(section: str, name: str) -> str:
    """The type of a setting in words."""
    owner = next(f.default_factory for f in dataclasses.fields(RunConfig) if f.name == section)
    return _in_words(get_type_hints(owner)[_field_name(name)])


def _in_words(kind: Any) -> str:
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", NoneType: "null"}
    if kind in words:
        return words[kind]
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(str, parts))
    if get_origin(kind) is tuple:
        return f"a list, each {_in_words(parts[0])}" if ... in parts else f"a list of {len(parts)} numbers"
    return " or ".join(map(_in_words, parts))
