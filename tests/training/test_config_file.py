from __future__ import annotations

from pathlib import Path

import pytest

from worm_dist.errors import ConfigError
from worm_dist.training.config_file import read_run_config


def _file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_values_are_replaced_by_their_dotted_names(tmp_path: Path) -> None:
    path = _file(tmp_path, "name: a\nsearch:\n  prune_ratio: 0.3\n  window: 4\n")
    config = read_run_config(
        path,
        [
            ("search.prune_ratio", "0.4"),
            ("truncation.frozen_weights", "hold"),
            ("search.every", "20ba"),
        ],
    )
    assert config.search.prune_ratio == 0.4
    assert config.search.window == 4
    assert config.truncation.frozen_weights == "hold"
    assert str(config.search.every) == "20ba"


def test_the_command_line_chooses_the_preset_and_the_file_keeps_its_own(tmp_path: Path) -> None:
    path = _file(tmp_path, "preset: worm\nsearch:\n  settled: 0.2\n")
    config = read_run_config(path, [("preset", "worm-paper")])
    assert config.truncation.mode == "soft"
    assert config.search.elbow.min_masks == 5
    assert config.search.settled == 0.2


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4, without a dot, as text; the setting was refused as 'not a number'."""
    config = read_run_config(_file(tmp_path, "optimizer:\n  weight_decay: 1e-4\n"), [])
    assert config.optimizer.weight_decay == 1e-4
    assert read_run_config(_file(tmp_path, ""), [("optimizer.lr", "5E-2")]).optimizer.lr == 0.05


@pytest.mark.fault(13, "all mistakes at once, each with its key")
def test_all_mistakes_are_told_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    path = _file(tmp_path, "epoch: 3\nsearch:\n  prune_ratoi: 0.3\n  window: many\n")
    with pytest.raises(ConfigError) as caught:
        read_run_config(path, [("optimizer.lr", "-1"), ("truncation.mode", "firm")])
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "epoch: unknown key; did you mean epochs?" in text
    assert "search.prune_ratoi: unknown key; did you mean search.prune_ratio?" in text
    assert "search.window:" in text and "'many'" in text
    assert "optimizer.lr:" in text and "truncation.mode:" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("search: {\n", "not YAML"),
        ("just words\n", "key: value"),
        ("epochs: 1\nepochs: 2\n", "line 2: key given twice: epochs"),
        ("1: 2\n", "key: value"),
        (
            "truncation:\n  mode: soft\n  frozen_weights: remove\n",
            "frozen_weights 'remove' contradicts",
        ),
        ("search:\n  prune_ratio: 0.8\n  min_keep_ratio: 0.3\n", "contradict"),
        ("search: 3\n", "search:"),
        ("preset: fast\n", "preset:"),
        ("data:\n  name: cifar10\n", "root is needed for 'cifar10'"),
        ("[]\n", "key: value"),
        ("self: 1\n", "self: unknown key"),
        ("a: &a [*a]\n", "a: unknown key"),
        ("model: {arguments: &a {x: *a}}\n", "model.arguments.x.*cyclic reference"),
        ("epochs: 1\nname: !!float x\n", "line 2: not a valid float: 'x'"),
        ("name: 2024-13-01\n", "line 1: not a valid timestamp: '2024-13-01'"),
        ("name: " + "[" * 1000, "nested too deeply"),
        ("epochs: " + "9" * 5000, "line 1: not a valid int: '9"),
        ("name: ..\n", "name: String should match pattern"),
        ("data: {root: 'a\\0b'}\n".replace("'", '"'), "a path cannot contain NUL"),
        ("optimizer: {lr: .inf}\n", "optimizer.lr: Input should be a finite number"),
        (
            "model: {arguments: {a: [1, .nan]}}\n",
            r"model\.arguments\.a\..*: Input should be a finite number, got nan",
        ),
        (
            "model: {arguments: {a: {1: 2}}}\n",
            r"model\.arguments\.a\..*: Input should be a valid str",
        ),
        ("model: {arguments: {a: 2024-01-01}}\n", "arguments.a: input was not a valid JSON value"),
    ],
)
@pytest.mark.fault(13, "keys given twice, files that are not YAML")
def test_unusable_files_are_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_run_config(_file(tmp_path, text), [])


def test_a_key_may_stand_beside_those_that_it_is_merged_with(tmp_path: Path) -> None:
    """It was taken for a key given twice, as merging lists both."""
    text = "data: {batch_size: 32}\nmodel: {arguments: {a: &a {x: 1, y: 1}, b: {<<: *a, x: 2}}}\n"
    config = read_run_config(_file(tmp_path, text), [])
    assert config.model.arguments["b"] == {"x": 2, "y": 1}


def test_settings_of_ones_own_keep_their_order_and_their_nesting(tmp_path: Path) -> None:
    """A run that goes on must see another order of patterns, of which the first that matches
    counts, and another nesting: {a: {b: 1}} and {a.b: 1} had one name."""
    flat = [
        read_run_config(_file(tmp_path, text), []).flat()
        for text in (
            "search: {ratios: {a: 0.1, b: 0.2}}\nmodel: {arguments: {a: {b: 1}}}\n",
            "search: {ratios: {b: 0.2, a: 0.1}}\nmodel: {arguments: {a.b: 1}}\n",
        )
    ]
    assert flat[0]["search.ratios"] == [["a", 0.1], ["b", 0.2]]
    assert {key for key in flat[0] if flat[0][key] != flat[1][key]} == {
        "search.ratios",
        "model.arguments",
    }


@pytest.mark.fault(13, "a file that is not there")
def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        read_run_config(tmp_path / "nowhere.yaml", [])


def test_unsafe_yaml_is_not_executed(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    path = _file(tmp_path, f"name: !!python/object/apply:pathlib.Path.touch ['{touched}']\n")
    with pytest.raises(ConfigError, match="not YAML"):
        read_run_config(path, [])
    assert not touched.exists()
