"""What the pages say of settings, presets, names and one another is so."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import worm_dist
from tests.docs.pages import PAGES, ROOT, blocks, text_of
from worm_dist.presets import PRESETS
from worm_dist.training.config_file import read_run_config
from worm_dist.training.run_config import RunConfig

SETTINGS = "docs/settings.md"


def _defaults() -> dict[str, str]:
    """What the tables of settings say, by key."""
    shown: dict[str, str] = {}
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", text_of(SETTINGS), flags=re.MULTILINE)
    for keys, defaults in rows:
        names = re.findall(r"`([^`]+)`", keys)
        if set(names) <= RunConfig().flat().keys():
            shown |= dict(zip(names, defaults.replace("`", "").split(", "), strict=True))
    return shown


def test_every_setting_is_shown() -> None:
    """Timeouts and the comparison of weights were among the errors, but in no table."""
    assert sorted(RunConfig().flat().keys() - _defaults().keys()) == []


def test_every_setting_is_shown_with_its_default(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    for key, text in _defaults().items():
        assert read_run_config(tmp_path / "empty.yaml", [(key, text)]) == RunConfig(), key


def test_every_preset_is_explained() -> None:
    for preset in PRESETS:
        assert f"| `{preset}` |" in text_of(SETTINGS)


def test_settings_of_the_method_card_have_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    rows = re.findall(r"^\| (`\S+`) \| ([^|]+) \|", text_of("docs/method-card.md"), re.MULTILINE)
    assert len(rows) > 5
    for key, text in rows:
        if key == "`search.budget`":
            continue  # a part, whose settings are all null
        changed = [(key.strip("`"), text.strip("`"))]
        assert read_run_config(tmp_path / "empty.yaml", changed) == RunConfig(), key


def test_every_public_name_is_in_the_reference() -> None:
    shown = set(re.findall(r"^::: worm_dist\.[\w.]*?(\w+)$", text_of("docs/api.md"), re.MULTILINE))
    assert sorted({*worm_dist.__all__} - shown) == []


def test_the_reference_names_what_is_there() -> None:
    for path in re.findall(r"^::: ([\w.]+)$", text_of("docs/api.md"), flags=re.MULTILINE):
        module, _, name = path.rpartition(".")
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, path
        public = re.search(r"^__all__ = \[(.*?)\]", Path(spec.origin).read_text(), re.M | re.S)
        assert public is not None and f'"{name}"' in public[1], path


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    """In the repository too, where they are read without the site."""
    for link in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", text_of(page)):
        if "://" not in link:
            assert ((ROOT / page).parent / link).is_file(), link


def test_the_first_page_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 250
    (loop,) = blocks("README.md", "python")
    assert len([line for line in loop.splitlines() if line]) <= 12
