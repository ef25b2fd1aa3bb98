"""Which recipe a command line trains. Needs no torch: a run that is killed at its start is looked for with it, too."""

import difflib
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from train.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[1] / "launch" / "configs"
DEFAULT = "demo"
NEEDS_RECIPE = ("--data.path", "--model.name", "--model.weights", "--model.checkpoint")
"""Nobody who chooses one of these wants the default recipe's settings for handwritten digits."""


def recipes() -> dict[str, str]:
    """Name -> what the recipe's first line says, for all that come with the project."""
    return {file.stem: _first_line(file) for file in sorted(RECIPES.glob("*.yaml"))}


def with_recipe_first(argv: Sequence[str]) -> list[str]:
    """The command line with its recipe as `--config FILE` in front, so that options mean the same on either side of it.

    Raises ConfigError for a recipe that is none, and for a command line that leaves open which one is meant.
    """
    files, rest, named = [], [], False
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in ("--config", "--recipe"):
            rest.append(word)
            continue
        value = value if equals else next(words, None)
        if value is None:
            raise ConfigError(
                f"{option}: found nothing, allowed: {'a YAML file' if option == '--config' else _names()}"
            )
        named = named or option == "--recipe"
        files.append(value if option == "--config" else str(_file(value)))
    if named and len(files) > 1:
        raise ConfigError(
            f"--recipe and --config: found {len(files)} recipes, allowed: one; a file of yours is --config FILE"
        )
    if not files:
        given = {word.partition("=")[0] for word in rest}
        if needs := [option for option in NEEDS_RECIPE if option in given]:
            raise ConfigError(
                f"{' and '.join(needs)} without a recipe: choose one with --recipe NAME ({_names()}; --recipe list "
                "shows them) or --config FILE"
            )
        files = [str(_file(DEFAULT))]
    return [*(word for file in files for word in ("--config", file)), *rest]


def is_list_wanted(argv: Sequence[str]) -> bool:
    return "--recipe=list" in argv or ("--recipe", "list") in pairwise(argv)


def _file(name: str) -> Path:
    file = RECIPES / f"{name.replace('-', '_')}.yaml"
    if "/" in name or not file.is_file():
        words = sorted(re.split("[-_]", name))
        close = [known for known in recipes() if sorted(known.split("_")) == words]  # imagenet-resnet50
        close = close or difflib.get_close_matches(name.replace("-", "_"), recipes(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"--recipe: found {name!r}{hint}, allowed: {_names()}; a file of yours is --config FILE")
    return file


def _names() -> str:
    return ", ".join(recipes())


def _first_line(file: Path) -> str:
    """The comment before the first empty one, as one line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines)
