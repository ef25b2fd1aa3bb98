"""Write docs/configuration.md, the table of every setting, from the configuration's dataclasses.

python docs/configuration.py
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import yaml

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in place of docs/, so that it also works without an installation

from train.config import RunConfig  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

Made by `python docs/configuration.py` from the dataclasses in the code; do not edit it here.

A setting is named `SECTION.NAME`. Its value comes from, the last one winning:

1. the default below,
2. the recipe, `--config FILE`, a YAML file,
3. the command line, `--SECTION.NAME VALUE`.

`launch/train.py --print_config` prints the result, and the run directory keeps it as `config.yaml`. An unknown name, a
wrong type or a value out of range is an error of one line, which names the setting, the value found and what is
allowed; the exit code is 2. If other settings make a setting ineffective, a note says so.
"""


def configuration_page() -> str:
    """The whole page, Markdown."""
    sections = [_section(section.name, section.default_factory) for section in dataclasses.fields(RunConfig)]
    return "\n".join([INTRODUCTION, *sections])


def _section(name: str, owner: type) -> str:
    """A heading and a table for the settings of one dataclass, and after them its sub-sections."""
    # Only a class's own fields are found in its source, so those that it inherits are asked for where they stand.
    docs = [docstring_parser.parse_from_object(kind) for kind in reversed(owner.__mro__) if kind is not object]
    meanings = {entry.args[1]: entry.description for part in docs for entry in part.params}
    types = get_type_hints(owner)
    rows, sub_sections = [], []
    for field in dataclasses.fields(owner):
        if dataclasses.is_dataclass(field.default_factory):
            sub_sections.append(_section(f"{name}.{field.name}", field.default_factory))
            continue
        meaning = field.metadata.get("help") or meanings[field.name]
        setting = f"{name}.{field.name.removesuffix('_')}"
        rows.append(_row(f"`{setting}`", in_words(types[field.name]), f"`{_in_yaml(field)}`", meaning))
    table = ["| setting | type | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([f"## {name}", "", docs[-1].short_description, "", *table, "", *sub_sections])


def _row(setting: str, kind: str, default: str, meaning: str) -> str:
    words = " ".join(meaning.split()).replace("*", r"\*").replace("|", r"\|")
    return f"| {setting} | {kind} | {default} | {words} |"


def _in_yaml(field: dataclasses.Field) -> str:
    """The default as a recipe would give it."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    plain = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(plain, default_flow_style=True, width=200).removesuffix("\n...\n").strip()


def in_words(kind: Any) -> str:
    """A type as a reader of YAML would say it."""
    words = {float: "number", int: "whole number", bool: "true or false", str: "text", type(None): "null"}
    if kind in words:
        return words[kind]
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if get_origin(kind) is tuple:
        return f"list of {in_words(parts[0])}s" if ... in parts else f"list of {len(parts)} numbers"
    return " or ".join(map(in_words, parts))


if __name__ == "__main__":
    PAGE.write_text(configuration_page(), encoding="utf-8")
