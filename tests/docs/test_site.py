"""The site is built without a warning, and opens without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT

pytest.importorskip("mkdocs", reason="the extra worm_dist[docs] is not installed")
pytest.importorskip("material", reason="the extra worm_dist[docs] is not installed")
pytest.importorskip("mkdocstrings", reason="the extra worm_dist[docs] is not installed")
pytestmark = pytest.mark.slow("builds the site, four seconds")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link or anchor ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--strict", "--quiet", "--config-file", ".docs/mkdocs.yml"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in PAGES:
        name = {"README.md": "index", "CONTRIBUTING.md": "contributing"}.get(page, Path(page).stem)
        assert (site / f"{name}.html").is_file(), page


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    loading = (
        r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)"
    )
    for page in site.rglob("*.html"):
        assert re.findall(loading, page.read_text()) == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"url\(\"?(?:https?:)?//|@import", sheet.read_text()) == [], sheet


def test_no_diagram_needs_a_script_of_another_host(site: Path) -> None:
    """The theme would load mermaid from one."""
    for page in site.rglob("*.html"):
        assert 'class="mermaid"' not in page.read_text(), page
