"""The configuration of a run: the owners' dataclasses put together, parsed and validated before anything else exists.

Precedence, last wins: defaults in the dataclasses, the YAML file, dotted overrides on the command line. An error is one
line that names the key, the value found and what is allowed.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from cup import DEVICES, CupError
from data import DataConfig
from data.batch import DECODING_ON_GPU, ON_DISK, require_sizes
from train.errors import ConfigError
from train.log.rundir import NAME
from train.loop.config import TrainConfig
from train.methods import METHODS, PruneConfig
from train.methods.meta_pruning import WITHOUT_EFFECT
from train.network.models import check_model_name
from train.network.optim import OptimConfig
from train.network.sources import network_of
from train.renamed import NEW_NAMES, options_with_new_names, with_new_names

T = TypeVar("T")

RAMPS_TO_A_TARGET = ("reduction", "speedup")
OF_CRITERIA = ("prune.criterion", "prune.features", "prune.use_bias")
OF_CUTS = tuple(f"prune.{name}" for name in WITHOUT_EFFECT)
RAMP_IN_T = ("prune.hard_ramp.slope", "prune.hard_ramp.offset")
# Settings of `data` that only some loaders, devices or other settings give an effect.
RANDAUGMENT = ("randaugment_ops", "randaugment_magnitude")
SYNTHETIC = ("synthetic_images", "synthetic_classes")
OF_PIXELS = ("resized_side", "interpolation", "mean", "std")
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
    silence_s: float = 60.0
    """Seconds without a sign of life after which a rank counts as lost, and the others end; one that is killed is
    noticed by its neighbours at once. 0 = never."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Where curves go beside log.jsonl; each takes its package's own environment variables."""
    project: str = "cupss"
    """What wandb and trackio call a project and MLflow an experiment."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field, the value found and what is allowed."""
        if not re.fullmatch(NAME, self.name):
            raise ValueError(f"name: found {self.name!r}, allowed: letters, digits, '.', '_' and '-', no slashes")
        checks = [
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0, below 2**32"),
            ("save_every_minutes", 0 <= self.save_every_minutes < math.inf, "a number from 0"),
            ("keep", 1 <= self.keep <= 1000, "1 to 1000"),
            ("silence_s", self.silence_s == 0 or 1 <= self.silence_s < math.inf, "0, or a number from 1"),
            ("timeout_minutes", 0 < self.timeout_minutes < 1e6, "a number above 0, below 1,000,000"),
        ]
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: str | None = None
    """A classification model of torchvision, timm:NAME, lenet, mlp, vgg16_cifar, resnet20_cifar (32, 44, 56), or
    package.module:factory, which is imported and called with num_classes.
    null = the network in model.checkpoint; resnet50 without."""
    checkpoint: str | None = None
    """Checkpoint to start from, usually one that launch/prune.py wrote: its network at its widths, with its weights;
    everything else begins anew. null = the full network, freshly initialised."""
    weights: str | None = None
    """Weights to start from, of the full network: FILE (.pth, .safetensors), timm:NAME, hf-hub:ORG/NAME, or
    torchvision:ResNet50_Weights.IMAGENET1K_V2; all but a file name the network, too. For another number of classes the
    classifier begins anew. null = fresh ones."""
    head_lr: float | None = None
    """Learning rate of the classifier at its highest, in place of optim.lr; null = optim.lr."""
    width: float = 1.0
    """Begin with this share of the channels of each group in prune.scope, fresh weights: a uniformly thinner network.
    FLOPs reduction is measured against the full network."""
    widths: str | None = None
    """Begin at the widths in this file, with fresh weights: those that a checkpoint ended with, or group name ->
    channels as JSON or YAML. null = at full width."""

    def __post_init__(self) -> None:
        """Raises ConfigError for an unknown name, ValueError for settings out of range or in conflict."""
        for name in ("checkpoint", "weights", "widths"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: found '', allowed: a file, or null")
        if not 0 < self.width <= 1:
            raise ValueError(f"width: found {self.width!r}, allowed: above 0, up to 1")
        shapes = {
            "checkpoint": self.checkpoint,
            "weights": self.weights,
            "width": None if self.width == 1 else self.width,
            "widths": self.widths,
        }
        if len(given := [name for name, value in shapes.items() if value is not None]) > 1:
            raise ValueError(f"{given[1]}: found {shapes[given[1]]!r} beside {given[0]}, allowed: one of them")
        if self.head_lr is not None and not 0 < self.head_lr < math.inf:
            raise ValueError(f"head_lr: found {self.head_lr!r}, allowed: a number above 0, or null")
        if self.weights is not None:
            object.__setattr__(self, "name", network_of(self.weights, self.name))
        elif self.name is None and self.checkpoint is None:
            object.__setattr__(self, "name", "resnet50")
        if self.name is not None:
            check_model_name(self.name)

    @property
    def narrowed(self) -> str | None:
        """What report and log call a network that is narrow from its first step; None for the full one."""
        if self.widths is not None:
            return f"from scratch at the widths of {self.widths}"
        return None if self.width == 1 else f"uniformly thinner, width {self.width:g}"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes."""

    run: RunOptions = field(default_factory=RunOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)

    def __post_init__(self) -> None:
        """Raises ValueError for settings that are at odds with each other."""
        last = self.prune.last_epoch
        if self.prune.shrinks and last is not None and last > self.train.epochs:
            raise ValueError(f"prune.last_epoch: found {last}, allowed: up to train.epochs ({self.train.epochs})")
        if self.prune.shrinks and self.prune.target_speedup and self.prune.device in DEVICES:
            known = DEVICES[self.prune.device].matrix
            if self.train.precision not in known:
                raise ValueError(
                    f"prune.device: found {self.prune.device}, which has no rates in train.precision "
                    f"{self.train.precision}; it has: {', '.join(known)}"
                )
        first = self.prune.early.first_epoch
        if self.prune.method == "early" and first > self.train.epochs:
            raise ValueError(
                f"prune.early.first_epoch: found {first}, allowed: up to train.epochs ({self.train.epochs})"
            )
        if self.prune.trains_pruning_net:
            self._check_pruning_net()
        if self.optim.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs: found {self.optim.warmup_epochs}, allowed: up to train.epochs "
                f"({self.train.epochs})"
            )
        if self.model.checkpoint is None and self.model.weights is None:
            try:
                require_sizes(self.data)
            except ValueError as error:
                raise ValueError(f"data.{error}") from error
        if self.data.start_size and self.data.grow_epochs > self.train.epochs:
            raise ValueError(
                f"data.grow_epochs: found {self.data.grow_epochs}, allowed: up to train.epochs ({self.train.epochs})"
            )

    def _check_pruning_net(self) -> None:
        reason = "(prune.method: meta_pruning, for "
        if not self.data.held_out:
            why = "launch/search.py judges networks by images held out)"
            raise ValueError(f"data.held_out: found 0, allowed: a whole number from 1 {reason}{why}")
        for name in ("checkpoint", "widths"):
            if (found := getattr(self.model, name)) is not None:
                why = "a PruningNet starts at full width, from nothing)"
                raise ValueError(f"model.{name}: found {found!r}, allowed: null {reason}{why}")
        if self.model.width < 1:
            why = "a PruningNet starts at full width)"
            raise ValueError(f"model.width: found {self.model.width:g}, allowed: 1 {reason}{why}")

    def without_effect(self) -> list[str]:
        """What was set and changes nothing, as notes for the user, one for each reason."""
        data, prune = self.data, self.prune
        on_gpu = self.run.device == "cuda" or (self.run.device == "auto" and torch.cuda.is_available())
        of_a_method = [key for key in all_settings() if key.startswith("prune.") and key != "prune.method"]
        if self.model.width < 1:
            of_a_method.remove("prune.scope")
        rules = [
            (not prune.shrinks, of_a_method, "prune.method: none"),
            (prune.shrinks, _of_other_methods(prune.method), f"prune.method: {prune.method}"),
            (prune.method == "prune_train", OF_CRITERIA, "prune.method: prune_train, which has its own criterion"),
            (prune.trains_pruning_net, OF_CUTS, "prune.method: meta_pruning, which cuts nothing"),
            (prune.trains_pruning_net, ["train.compile", "train.compile_steps"], "widths that change at every step"),
            (prune.criterion != "cup", ["prune.features", "prune.use_bias"], f"prune.criterion: {prune.criterion}"),
            (prune.hard_ramp.kind in RAMPS_TO_A_TARGET, RAMP_IN_T, f"prune.hard_ramp.kind: {prune.hard_ramp.kind}"),
            (prune.target_speedup is None, ["prune.device"], "prune.target_speedup: null"),
            (self.optim.schedule == "cosine", ["optim.milestones", "optim.gamma"], "optim.schedule: cosine"),
            (self.optim.name == "apex_lamb", ["optim.momentum", "optim.nesterov"], "optim.name: apex_lamb"),
            (self.train.teacher is None, ["train.teacher_share", "train.teacher_temperature"], "train.teacher: null"),
            (self.train.compile == "none", ["train.compile_steps"], "train.compile: none"),
            (data.loader == "synthetic", _of_data(*ON_DISK, *AUGMENTING, *OF_PIXELS), "data.loader: synthetic"),
            (data.loader == "folder", _of_data("mmap"), "data.loader: folder"),
            (data.loader == "folder" or not on_gpu, _of_data(*DECODING_ON_GPU), "no decoding on a GPU"),
            (data.loader in ("folder", "dali"), _of_data(*SYNTHETIC), "images from a disk"),
            (data.auto_augment != "randaugment", _of_data(*RANDAUGMENT), f"data.auto_augment: {data.auto_augment}"),
            (not data.start_size, _of_data("grow_epochs", "size_step"), "data.start_size: 0"),
        ]
        default = RunConfig()
        notes = []
        for applies, keys, reason in rules:
            changed = [key for key in keys if attrgetter(key)(self) != attrgetter(key)(default)]
            if applies and changed:
                notes.append(f"no effect with {reason}: {', '.join(changed)}")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, as YAML and JSON hold it."""
        return _plain(dataclasses.asdict(self))


@functools.cache
def build_parser(prog: str, default_config: str) -> ArgumentParser:
    """The command line: --config FILE, dotted overrides, --print_config, --help with every unit and default.

    Parsing leaves it as it is; building takes twice as long as parsing, and a comparison parses dozens of recipes.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        description="Train a classifier on several ranks while a pruning method resizes it.",
        epilog=f"Without --recipe and --config the recipe {default_config} is trained.",
    )
    parser.add_argument("--config", action="config", help="Recipe, a YAML file.")
    parser.add_argument(
        "--recipe", metavar="NAME", help="Recipe that comes with the project, or `list` to see them all."
    )
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error that has one line else.")
    for section in dataclasses.fields(RunConfig):
        parser.add_class_arguments(section.default_factory, section.name)
    return parser


def parse_config(argv: list[str], prog: str, default_config: str) -> RunConfig:
    """Command line -> configuration. Raises ConfigError; --help and --print_config print and exit with 0.

    Options before --config are overridden by the recipe; train/recipes.py puts it in front. Names that settings had in
    earlier versions are read, with a warning that says the new one.
    """
    if not any(arg == "--config" or arg.startswith("--config=") for arg in argv):
        argv = ["--config", default_config, *argv]
    argv, renamed = options_with_new_names(argv)
    if renamed and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"settings have changed: {'; '.join(dict.fromkeys(renamed))}", stacklevel=2)
    try:
        namespace = build_parser(prog, default_config).parse_args(argv)
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error), argv)) from error
    values = namespace.as_dict()
    sections = {section.name: values[section.name] for section in dataclasses.fields(RunConfig)}
    return config_from_dict(sections)


def config_from_dict(values: dict[str, dict[str, Any]]) -> RunConfig:
    """Nested plain data -> configuration, of an earlier version, too. Raises ConfigError for what is out of range."""
    values, _ = with_new_names(values)
    known = [section.name for section in dataclasses.fields(RunConfig)]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{unknown[0]}: unknown settings, allowed: {', '.join(f'{name}.*' for name in known)}")
    sections = {}
    for section in dataclasses.fields(RunConfig):
        if not isinstance(values.get(section.name), dict):
            found = values.get(section.name)
            raise ConfigError(f"{section.name}: found {found!r}, allowed: settings, each a name and a value")
        sections[section.name] = _section(section.name, section.default_factory, values[section.name])
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


def _section(name: str, kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass of these values, with the dataclasses inside it. `name`: dotted, for errors."""
    for key, value in values.items():
        if any(isinstance(one, float) and not math.isfinite(one) for one in (value, *_entries(value))):
            raise ConfigError(f"{name}.{key}: found {value!r}, allowed: finite numbers")
    inner = {f.name: f.default_factory for f in dataclasses.fields(kind) if dataclasses.is_dataclass(f.default_factory)}
    try:
        settings = {
            key: _section(f"{name}.{key}", inner[key], value) if key in inner and isinstance(value, dict) else value
            for key, value in _tuples(values).items()
        }
        return kind(**settings)
    except (ValueError, CupError) as error:
        raise ConfigError(f"{name}.{error}") from error
    except TypeError as error:
        raise ConfigError(f"{name}: a configuration of another version ({error})") from error


def _of_other_methods(method: str) -> list[str]:
    """The settings that only methods other than this one have."""
    sections = [f"prune.{name}." for name in METHODS if name != method]
    return [key for key in all_settings() if key.startswith(tuple(sections))]


def _entries(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else ()


def _of_data(*names: str) -> list[str]:
    return [f"data.{name}" for name in names]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _one_line(message: str, argv: list[str]) -> str:
    """jsonargparse's message in this project's form: key, value found, what is allowed."""
    if match := re.search(r"Parser key \"([\w.]+)\":.*(?:Got|Given) value:? ?(?:type: \S+)? ?(.*)", message, re.DOTALL):
        key, found = match.groups()
        return f"{key}: found {found.strip().partition(chr(10))[0]!r}, allowed: {_allowed(key)}"
    if match := re.search(r"Parser key \"([\w.]+)\": Unable to load config ['\"](.*?)['\"]", message, re.DOTALL):
        return f"{match[1]}: found {match[2]!r}, allowed: settings, each a name and a value"
    if match := re.search(r"(?:Group '(.+?)' does not accept option|Option) '(.+?)'", message):
        return _unknown_key(".".join(part for part in match.groups() if part))
    if match := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
        return _unknown_key(match.group(1).split()[0].lstrip("-").split("=")[0])
    # What is left is about the recipe as a whole; jsonargparse does not always say which file that is.
    return " ".join([*message.split(), f"(command line: {' '.join(argv)})"])


def _unknown_key(key: str) -> str:
    known = list(all_settings())
    close = difflib.get_close_matches(key, [*known, *NEW_NAMES], n=1, cutoff=0.6)
    group = [name for name in known if name.split(".")[0] == key.split(".")[0]]
    allowed = ", ".join(group) if group else ", ".join(section.name + ".*" for section in dataclasses.fields(RunConfig))
    hint = f", did you mean {NEW_NAMES.get(close[0], close[0])}?" if close else ";"
    return f"{key}: unknown key{hint} allowed: {allowed}"


def all_settings() -> dict[str, tuple[type, dataclasses.Field]]:
    """Dotted key -> (the dataclass that declares it, its field), of everything that a recipe may hold."""

    def settings(kind: type, prefix: str) -> Iterator[tuple[str, tuple[type, dataclasses.Field]]]:
        for own in dataclasses.fields(kind):
            inner = own.default_factory
            if dataclasses.is_dataclass(inner):
                yield from settings(inner, f"{prefix}{own.name}.")
            else:
                yield f"{prefix}{own.name}", (kind, own)

    return dict(settings(RunConfig, ""))


def _allowed(key: str) -> str:
    """The type of a setting, as an error names it; for a section, that it is one."""
    known = all_settings()
    if key not in known:
        return "settings, each a name and a value"
    owner, own = known[key]
    return _in_words(get_type_hints(owner)[own.name])


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
