"""Pages and files from outside docs/, and the links to them.

The pages are read in the repository too, so a link is the path of a file there.  Pages outside
docs/ become pages of the site; another file, such as a script, is copied to it if a page links to
it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages outside docs/, by their paths in the repository and in the site."""

_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s:#]+)(?=(#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is outside docs/."""
    added = {ROOT / path: name for path, name in PAGES.items()}
    for name in ("iframe_worker.js", "site.css"):
        added[HERE / name] = f"assets/{name.replace('_', '-')}"
    docs = ROOT / "docs"
    pages = [*(ROOT / path for path in PAGES), *docs.rglob("*.md")]
    for page in pages:
        for link in _LINK.finditer(page.read_text()):
            linked = (page.parent / link["path"]).resolve()
            if linked.is_file() and linked not in added and not linked.is_relative_to(docs):
                added[linked] = _place(linked)
    for path, name in added.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page, which are paths in the repository, be paths in the site."""
    assert page.file.abs_src_path is not None
    if page.file.src_uri.endswith("/ledger.md"):
        page.meta["hide"] = ["toc"]  # its tables are wide
    folder = Path(page.file.abs_src_path).parent

    def in_site(link: re.Match[str]) -> str:
        linked = (folder / link["path"]).resolve()
        if not linked.is_file():
            return link["path"]  # of which mkdocs complains
        return posixpath.relpath(_place(linked), PurePosixPath(page.file.src_uri).parent)

    return _LINK.sub(in_site, markdown)


def _place(path: Path) -> str:
    """Where a file of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return PAGES.get(name, f"files/{name.lstrip('.')}")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """End what introduces a block in a docstring with one colon."""
    return html.replace("::</p>", ":</p>")
