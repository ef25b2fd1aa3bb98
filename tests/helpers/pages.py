"""Reads what a Markdown page links to, shows and names, without a Markdown library."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def code_blocks(page: str, language: str = "") -> list[str]:
    """The contents of the fenced blocks in this language."""
    return [code for found, code in CODE_BLOCK.findall(page) if found == language]


def commands(page: str) -> list[str]:
    """The command lines in blocks without a language; a backslash at the end of a line joins it with the next."""
    lines = "".join(code_blocks(page)).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines]


def anchors(page: str) -> set[str]:
    """The names by which links find the headings, as GitHub makes them."""
    found, seen = set(), Counter()
    for heading in re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", page), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def broken_links(path: Path) -> Iterator[str]:
    """The links of the page at `path` to files or headings that do not exist; other sites are not asked."""
    for target in LINK.findall(CODE_BLOCK.sub("", path.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            yield target
