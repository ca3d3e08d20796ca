"""What ``docs/papers.md`` says of presets and configs is what the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from worm_dist.__main__ import main
from worm_dist.presets import PRESETS
from worm_dist.training.preset_differences import preset_differences
from worm_dist.training.run_config import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text()
CONFIGS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))


def _settings(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(path.read_text())
    return settings


def test_the_table_of_presets_is_that_of_the_code() -> None:
    found = preset_differences({})
    assert "| setting | " + " | ".join(f"`{name}`" for name in found.presets) + " |" in PAGE
    for key, values in found.rows.items():
        assert f"| `{key}` | {' | '.join(values)} |\n" in PAGE
    assert len(re.findall(r"^\| `[a-z0-9_.]+` \|", PAGE, flags=re.MULTILINE)) == len(found.rows)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_a_paper_names_its_control_which_changes_one_thing(path: Path) -> None:
    """WORM's control is Early-Bird: the truncation alone differs.  Early-Bird's is dense."""
    header = path.read_text().partition("\nname:")[0]
    (control,) = re.findall(r"Control: add `--preset ([\w-]+)`", header)
    settings = _settings(path)
    changed = preset_differences(settings).between(settings["preset"], control)
    assert control == ("early-bird" if settings["preset"] == "worm-paper" else "dense")
    only = "truncation." if control == "early-bird" else "search.enabled"
    assert changed and all(key.startswith(only) for key in changed)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_a_paper_has_the_published_rule(path: Path) -> None:
    settings = _settings(path)
    search = RunConfig(**settings).search
    if "earlybert" in path.stem:
        assert (search.selection, search.window) == ("quantile", 1)
        return
    assert (search.grouping, search.selection, search.min_keep_ratio) == ("layer", "above", 0)
    assert (search.first, search.window, search.settled) == ("before_training", 5, 0.1)
    assert search.masks_before_elbow == 5 and search.elbow.latest is None


def test_explain_prints_what_another_preset_would_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(ROOT / "configs" / "paper" / "vgg11_bn_cifar10.yaml")
    assert main(["train", path, "--explain", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "--preset early-bird changes truncation.mode\n" in printed
    assert "--preset dense changes search.enabled\n" in printed
    assert re.search(r"search\.l1 ", printed) is None  # the file sets it for all presets
    assert main(["train", path, "--explain", "--search.budget.flops", "0.5"]) == 2


def test_explain_says_which_presets_the_file_contradicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("search.budget.flops: 0.5\n")
    assert main(["train", str(path), "--explain"]) == 0
    printed = capsys.readouterr().out
    for name in PRESETS:
        refused = name in ("worm-paper", "early-bird")
        assert (f"--preset {name}: refused: search: budget flops 0.5" in printed) == refused
