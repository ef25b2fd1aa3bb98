"""Networks of the user's own: `package.module:factory`, which is imported and called with num_classes.

A name in a file is not enough to import it: only a configuration or a command line may say so (`train/checkpoint`).
"""

import importlib
import re
import sys
from pathlib import Path

import torch
from torch import nn

from cup import ChannelGroup
from train.errors import ConfigError

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_factory(name: str) -> bool:
    """Whether it has the form of a factory's name; imports nothing."""
    return FACTORY.fullmatch(name) is not None and not name.startswith("timm:")


def build_own(name: str, num_classes: int) -> nn.Module:
    """What the factory gives for `num_classes`. Its module is looked for in the working directory, too.

    Raises ConfigError where it cannot be imported or gives no network.
    """
    module, _, factory = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # in a script its own folder alone is there
        sys.path.append(here)
    try:
        model = getattr(importlib.import_module(module), factory)(num_classes=num_classes)
    except Exception as error:  # whatever the user's code raises
        why = " ".join(f"{type(error).__name__}: {error}".split())
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        hint = f"; looked for in {here} and on PYTHONPATH" if missing else ""
        raise ConfigError(f"model.name: {name}, called with num_classes={num_classes}, fails ({why}){hint}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name: {name} gives a {type(model).__name__}, allowed: a torch.nn.Module")
    return model


def check_own(name: str, model: nn.Module, example_input: torch.Tensor, num_classes: int) -> None:
    """Raises ConfigError if the network does not make logits, (1, num_classes), of the example, (1, C, H, W)."""
    try:
        with torch.no_grad():
            logits = model.eval()(example_input)
    except Exception as error:  # whatever the user's code raises
        why = " ".join(f"{type(error).__name__}: {error}".split())
        shape = tuple(example_input.shape)
        raise ConfigError(f"model.name: {name} does not take images of shape {shape} ({why})") from error
    finally:
        model.train()
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (1, num_classes):
        raise ConfigError(f"model.name: {name} makes {found} of one image, allowed: logits (1, {num_classes})")


def shrinking_note(name: str, groups: list[ChannelGroup]) -> str:
    """What can shrink, in a line for the user; groups: of the network, all of them."""
    able = [group.name for group in groups if not group.frozen]
    kept = [f"{group.name} ({group.frozen})" for group in groups if group.frozen]
    can = f"{len(able)} of {len(groups)} channel groups can shrink"
    return f"{name}: {can}{': ' if able else ''}{', '.join(able)}{'; not ' if kept else ''}{', '.join(kept)}"
