"""Settings whose names have changed, or that are gone: what earlier versions wrote is read, and their recipes and
command lines.
"""

import copy
import errno
from pathlib import Path
from typing import Any

import yaml

from train.errors import ConfigError
from train.files import read_bounded

MAX_RECIPE_BYTES = 1 << 20
UNCHANGED = ("target_reduction", "last_epoch", "every", "round_to", "min_channels", "features", "use_bias", "scope")
NEW_NAMES = {
    "cup.enabled": "prune.method",
    "cup.ramp": "prune.hard_ramp.kind",
    "cup.slope": "prune.hard_ramp.slope",
    "cup.offset": "prune.hard_ramp.offset",
    "cup.momentum": "prune.momentum",
    **{f"cup.{name}": f"prune.{name}" for name in UNCHANGED},
    "model.from": "model.checkpoint",
}
GONE = {
    "prune.recalibrate": "no training step ever read the statistics that it measured",
    "optim.rewarm_steps": "a second warm-up after each cut kept no accuracy, docs/results.md",
}
"""Settings that are read past, and why they are gone."""


def with_new_names(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Nested settings with today's names, and a phrase for each that had an older one, or is gone.

    The input is not changed. Where a setting has a value under both names, the one under today's name counts.
    """
    result = copy.deepcopy(values)
    renamed = []
    for old, new in NEW_NAMES.items():
        section, key = old.split(".")
        settings = result.get(section)
        if isinstance(settings, dict) and key in settings:
            _put(result, new.split("."), _new_value(old, settings.pop(key)))
            renamed.append(_phrase(old))
    for old in GONE:
        section, key = old.split(".")
        settings = result.get(section)
        if isinstance(settings, dict) and key in settings:
            del settings[key]
            renamed.append(_phrase(old))
    if result.get("cup") == {}:
        del result["cup"]
    return result, renamed


def recipe_with_new_names(recipe: str) -> tuple[str, list[str]]:
    """What --config reads: the recipe's path, or its content as YAML with today's names where it has older ones.

    Raises ConfigError for what the parser would read for ever, or not survive.
    """
    try:
        values = yaml.safe_load(read_bounded(Path(recipe), MAX_RECIPE_BYTES).decode())
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise ConfigError(f"--config: found {recipe}, allowed: a recipe, a YAML file ({error.strerror})") from error
        return recipe, []  # the parser reports what is wrong with it
    except RecursionError as error:
        raise ConfigError(f"--config: found {recipe}, which is nested too deep, allowed: a recipe") from error
    except (UnicodeDecodeError, yaml.YAMLError):
        return recipe, []
    if not isinstance(values, dict):
        return recipe, []
    values, renamed = with_new_names(values)
    return (yaml.safe_dump(values), renamed) if renamed else (recipe, [])


def options_with_new_names(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command line with today's names for its dotted options, and the recipes that --config names as well."""
    words: list[str] = []
    renamed: list[str] = []
    rest = iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--") if word.startswith("--") else ""
        if name != "config" and name not in NEW_NAMES and name not in GONE:
            words.append(word)
            continue
        following = value if equals else next(rest, None)
        given = [] if following is None else [following]
        if name == "config" and given:
            recipe, phrases = recipe_with_new_names(given[0])
            words += ["--config", recipe]
            renamed += phrases
        elif name in GONE:
            renamed.append(_phrase(name))
        else:
            words += [f"--{NEW_NAMES[name]}" if name in NEW_NAMES else option, *(_new_value(name, v) for v in given)]
            renamed += [_phrase(name)] if name in NEW_NAMES else []
    return words, renamed


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    *owners, key = path
    for owner in owners:
        values = values.setdefault(owner, {})
    values.setdefault(key, value)


def _new_value(old: str, value: Any) -> Any:
    if old != "cup.enabled":
        return value
    return "none" if str(value).lower() in ("false", "no", "off") else "hard_ramp"


def _phrase(old: str) -> str:
    if old == "cup.enabled":
        return "cup.enabled is now prune.method (true: hard_ramp, false: none)"
    if old in GONE:
        return f"{old} is gone and does nothing ({GONE[old]})"
    return f"{old} is now {NEW_NAMES[old]}"
