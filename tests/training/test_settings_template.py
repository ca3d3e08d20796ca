"""What ``init`` prints is a whole settings file, and says what the classes of the settings say."""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path

import pytest

from worm_dist.__main__ import main
from worm_dist.presets import PRESETS
from worm_dist.training.config_file import read_run_config
from worm_dist.training.run_config import RunConfig
from worm_dist.training.settings_template import TO_FILL_IN, settings_template

_SETTING = re.compile(r"^#?([a-z][\w.]*): (.*)$", flags=re.MULTILINE)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_template_is_valid_as_it_is_and_with_every_setting_active(
    preset: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(settings_template(preset))
    assert read_run_config(path, []) == RunConfig(preset=preset)
    path.write_text(_SETTING.sub(r"\1: \2", settings_template(preset)))
    assert read_run_config(path, []) == RunConfig(preset=preset)


def test_every_setting_is_in_the_template_below_its_description() -> None:
    text = settings_template("worm")
    keys = [key for key, _ in _SETTING.findall(text)]
    assert sorted(keys) == sorted(RunConfig().flat())
    lines = text.splitlines()
    pairs = itertools.pairwise(lines)
    assert [line for before, line in pairs if _SETTING.match(line) and not before] == []
    assert "a fraction such as `1/3`.\n#search.prune_ratio: 0.5" in text


def test_only_what_is_to_be_filled_in_and_the_preset_are_active() -> None:
    """So the same file runs with another preset, as a control experiment."""
    active = re.findall(r"^([a-z][\w.]*): ", settings_template("worm"), flags=re.MULTILINE)
    assert sorted(active) == sorted([*TO_FILL_IN, "preset"])
    marked = re.findall(
        r"^([\w.]+): .*# <- fill in$", settings_template("worm"), flags=re.MULTILINE
    )
    assert sorted(marked) == sorted(TO_FILL_IN)


def test_what_init_prints_passes_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--preset", "worm-paper"]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["train", str(path), "--check"]) == 0
    assert main(["train", str(path), "--check", "--preset", "dense"]) == 0
    filled = re.sub(r"name: digits .*", "name: cifar10", path.read_text())
    path.write_text(filled.replace("root: null", "root: /data/cifar"))
    assert main(["train", str(path), "--check"]) == 0
    assert capsys.readouterr().err == ""


def test_a_wrong_preset_of_the_template_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--preset", "wurm"]) == 2
    assert "preset: Input should be 'worm', 'worm-paper'" in capsys.readouterr().err


@pytest.mark.fault(26, "init | head -1")
def test_a_reader_may_stop_reading_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["init"]) == 0
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is left to flush
