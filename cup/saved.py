"""A network in a folder: model.safetensors and config.json, from which `load` builds it without the trainer.

config.json follows timm's layout (https://huggingface.co/docs/timm/hf_hub), so that timm and the Hugging Face Hub read
what they know of it; what only this package needs is under "cup". The one file of the library that touches a disk.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cup.errors import CupError
from cup.networks import build_network
from cup.surgery import shrink_to

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
VERSION = 1
WITH_DROPPED = 2
"""The version of a network with dropped blocks, which readers of version 1 would take for weights that do not fit."""
MAX_CONFIG_BYTES = 1 << 24
MAX_SIDE = 16384
MAX_CHANNELS = 1 << 20
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True, kw_only=True)
class SavedNetwork:
    """What config.json says: which network, and which images it wants.

    name: as `cup.networks.build_network` takes it: `resnet18`, `timm:resnet26d`.
    widths: channel group -> channels, of the groups that are narrower than in the full network.
    dropped: names of the residual blocks of the full network that are their shortcut in this one.
    input_size: one image, (channels, height, width).
    resize_size: what the image is resized to before the crop of its centre, pixels.
    crop_mode: what is resized, in timm's words: center, the shorter side; squash, both; border, the longer one.
    interpolation: of the resize, such as bilinear.
    mean, std: of each channel, for pixels in 0..1.
    classes: their names, in the order of the logits; None where unknown.
    licence: of the weights, as the Hugging Face Hub abbreviates it (apache-2.0); None where nobody said.
    """

    name: str
    num_classes: int
    widths: Mapping[str, int] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    input_size: tuple[int, int, int]
    resize_size: int
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: Sequence[str] | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        """Raises CupError naming the field and what is allowed."""
        channels = self.input_size[0] if self.input_size else 0
        are_widths = all(_is_count(width, MAX_CHANNELS) for width in self.widths.values())
        checks = [
            ("name", isinstance(self.name, str), "a network's name"),
            ("num_classes", _is_count(self.num_classes, MAX_CHANNELS), "a whole number from 1"),
            ("widths", are_widths, "channels, a whole number from 1"),
            ("dropped", _are_names(self.dropped), "names of blocks"),
            ("input_size", len(self.input_size) == 3 and all(map(_is_count, self.input_size)), "3 whole numbers"),
            ("resize_size", _is_count(self.resize_size), f"1 to {MAX_SIDE}"),
            ("crop_mode", self.crop_mode in CROP_MODES, " or ".join(CROP_MODES)),
            ("interpolation", isinstance(self.interpolation, str), "a word, such as bilinear"),
            ("mean", len(self.mean) == channels and all(map(_is_finite, self.mean)), f"{channels} finite numbers"),
            ("std", len(self.std) == channels and all(map(_is_above_0, self.std)), f"{channels} above 0"),
            (
                "classes",
                self.classes is None or (_are_names(self.classes) and len(self.classes) == self.num_classes),
                f"{self.num_classes} names",
            ),
            ("licence", self.licence is None or isinstance(self.licence, str), "a name"),
        ]
        for name, is_right, allowed in checks:
            if not is_right:
                raise CupError(f"{name}: found {str(getattr(self, name))[:100]}, allowed: {allowed}")

    def example_input(self) -> torch.Tensor:
        """A zero image, (1, channels, height, width)."""
        return torch.zeros(1, *self.input_size)


def load(folder: str | Path, build: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """The network that `save` wrote to the folder: at its widths, with its weights, on the CPU, in evaluation mode.

    build: number of classes -> the full network; only for one of your own, which no name builds.
    Raises CupError if a file is missing, is not the one that config.json describes, or does not fit the network.
    """
    saved, digest = _read(folder)
    path = Path(folder) / WEIGHTS_FILE
    _check_weights(path, digest)
    model = _build(saved, Path(folder) / CONFIG_FILE) if build is None else build(saved.num_classes)
    try:
        if saved.widths or saved.dropped:  # only a network that was cut has to be one that can be traced
            shrink_to(model, saved.widths, saved.example_input(), dropped=saved.dropped)
        _safetensors().load_model(model, path)
    except CupError as error:
        raise CupError(f"{folder}: {error}") from error
    except Exception as error:  # of safetensors' own type, or RuntimeError for weights of other names or shapes
        raise CupError(f"{path} does not fit {saved.name}: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def save(model: nn.Module, folder: str | Path, saved: SavedNetwork) -> None:
    """Write the model's weights, and what `saved` says of it, to the folder, which is made if it is not there.

    Raises CupError if a file cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _safetensors().save_model(model, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
        text = json.dumps(_to_json(saved, _digest(folder / WEIGHTS_FILE)), indent=2, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CupError(f"could not write {folder}: {error.strerror or error}") from error


def read_saved(folder: str | Path) -> SavedNetwork:
    """What the folder's config.json says. Raises CupError for a folder without one, or one that is not as written."""
    return _read(folder)[0]


def _read(folder: str | Path) -> tuple[SavedNetwork, str]:
    """Also the SHA-256 of the weights."""
    path = Path(folder) / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CupError(f"{path}: found {path.stat().st_size:,} bytes, at most {MAX_CONFIG_BYTES:,} are read")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CupError(f"{folder}: no {CONFIG_FILE}; a network's folder has it and {WEIGHTS_FILE}") from error
    except OSError as error:
        raise CupError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CupError(f"{path}: no JSON ({str(error)[:100]})") from error
    try:
        return _from_json(config), str(config["cup"]["weights_sha256"])
    except CupError as error:
        raise CupError(f"{path}: {error}") from error
    except KeyError as error:
        raise CupError(f"{path}: {error} is missing: no network's description as cup.save writes it") from error
    except (TypeError, AttributeError) as error:
        raise CupError(f"{path}: a value is of another type than cup.save writes ({error})") from error


def _check_weights(path: Path, digest: str) -> None:
    """Raises CupError unless this is the file with that SHA-256."""
    if not path.is_file():  # a pipe would be waited for
        raise CupError(f"{path.parent}: no {path.name}; a network's folder has it and {CONFIG_FILE}")
    try:
        found = _digest(path)
    except OSError as error:
        raise CupError(f"{path}: cannot be read ({error.strerror or error})") from error
    if found != digest:
        raise CupError(
            f"{path} is not the file that {CONFIG_FILE} describes: SHA-256 {found[:12]}, expected {digest[:12]}; take "
            "both from the same export"
        )


def _build(saved: SavedNetwork, path: Path) -> nn.Module:
    """The full network by its name, which stands in the file at `path`."""
    try:
        return build_network(saved.name, saved.num_classes, saved.input_size[-1])
    except CupError as error:
        raise CupError(
            f"{path}: cup.network: {error}; cup.load(folder, build=...) takes a class of your own"
        ) from error


def _to_json(saved: SavedNetwork, digest: str) -> dict[str, Any]:
    side = saved.input_size[-1]
    images = {
        "input_size": list(saved.input_size),
        "fixed_input_size": False,
        "interpolation": saved.interpolation,
        # timm resizes to floor(side / crop_pct), and a rounded quotient may be above the true one.
        "crop_pct": math.nextafter(side / saved.resize_size, 0),
        "crop_mode": saved.crop_mode,
        "mean": list(saved.mean),
        "std": list(saved.std),
        "num_classes": saved.num_classes,
        **({} if saved.licence is None else {"license": saved.licence}),
    }
    own = {
        "version": WITH_DROPPED if saved.dropped else VERSION,
        "network": saved.name,
        "widths": dict(saved.widths),
        **({"dropped": list(saved.dropped)} if saved.dropped else {}),
        "resize_size": saved.resize_size,
        "weights_sha256": digest,
    }
    return {
        "architecture": saved.name.removeprefix("timm:"),
        "num_classes": saved.num_classes,
        **({} if saved.classes is None else {"label_names": list(saved.classes)}),
        "pretrained_cfg": images,
        "cup": own,
    }


def _from_json(config: dict[str, Any]) -> SavedNetwork:
    """Raises CupError for a value out of range, KeyError, TypeError or AttributeError for one that is not there."""
    own, images = config["cup"], config["pretrained_cfg"]
    if own["version"] not in (VERSION, WITH_DROPPED):
        found, allowed = own["version"], f"{VERSION} or {WITH_DROPPED}"
        raise CupError(f"cup.version: found {found!r}, allowed: {allowed}; another version wrote it")
    return SavedNetwork(
        name=own["network"],
        num_classes=config["num_classes"],
        widths=own["widths"],
        dropped=own.get("dropped", ()),
        input_size=tuple(images["input_size"]),
        resize_size=own["resize_size"],
        crop_mode=images["crop_mode"],
        interpolation=images["interpolation"],
        mean=tuple(images["mean"]),
        std=tuple(images["std"]),
        classes=config.get("label_names"),
        licence=images.get("license"),
    )


def _is_count(value: Any, most: int = MAX_SIDE) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_above_0(value: Any) -> bool:
    return _is_finite(value) and value > 0


def _are_names(names: Any) -> bool:
    return isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CupError("saved networks need safetensors, which is not installed: pip install safetensors") from error
    return safetensors.torch
