"""For mkdocs: the site holds README as its start page, and the pages and pictures outside docs/ that it links to."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "cup/*.md", "results/*.png")
LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/, at the paths that they have in the repository."""
    for path in (path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, _on_site(str(path.relative_to(ROOT))), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links that hold in the repository at the same files on the site."""
    on_site = page.file.src_uri
    in_repository = str(Path(page.file.abs_src_path).relative_to(ROOT))

    def moved(link: re.Match[str]) -> str:
        target = _on_site(normpath(join(dirname(in_repository), link[1])))
        return f"]({relpath(target, dirname(on_site) or '.')})"

    return LINK.sub(moved, markdown)


def _on_site(path: str) -> str:
    """Where the site has what lies at `path` in the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
