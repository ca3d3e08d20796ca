from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worm_dist.config import WormConfig
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
    assert config.search.elbow.min_masks == "window"
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
        ("name: !!timestamp 2024-13-01\n", "line 1: not a valid timestamp: '2024-13-01'"),
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
        (
            "model: {arguments: {a: !!timestamp 2024-01-01}}\n",
            "arguments.a: input was not a valid JSON value",
        ),
        ("data: {augment: off}\n", "data.augment: .*, got 'off'; write true or false"),
        ("optimizer: {lr: 1:30}\n", "optimizer.lr: .*, got '1:30'"),
        ("epochs: 1_000\n", "epochs: .*, got '1_000'"),
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


_AS_WRITTEN = {
    "off": "off",
    "on": "on",
    "yes": "yes",
    "NO": "NO",
    "true": True,
    "False": False,
    "010": 10,
    "0o10": 8,
    "0x1F": 31,
    "0b1": "0b1",
    "1:30": "1:30",
    "1:30.5": "1:30.5",
    "1_000": "1_000",
    "2024-01-01": "2024-01-01",
    "=": "=",
    "1e3": 1000.0,
    "-.5e-1": -0.05,
    "3.": 3.0,
    "~": None,
    "null": None,
}


@pytest.mark.fault(38, "words and numbers, in the file and on the command line")
@pytest.mark.parametrize(("text", "value"), list(_AS_WRITTEN.items()), ids=list(_AS_WRITTEN))
def test_words_and_numbers_are_what_they_look_like(
    tmp_path: Path, text: str, value: object
) -> None:
    """YAML 1.1 read off as false, 010 as eight and 1:30 as ninety."""
    path = _file(tmp_path, f"model: {{arguments: {{a: {text}}}}}\n")
    for found in (
        read_run_config(path, []).model.arguments["a"],
        read_run_config(path, [("model.arguments", f"{{a: {text}}}")]).model.arguments["a"],
        read_run_config(path, [("model.arguments.a", text)]).model.arguments["a"],
    ):
        assert (found, type(found)) == (value, type(value))


@pytest.mark.fault(38, "--truncation.mode off")
def test_truncation_can_be_turned_off_as_documented(tmp_path: Path) -> None:
    """It was refused as False."""
    path = _file(tmp_path, "truncation:\n  mode: off\n")
    assert read_run_config(path, []).truncation.mode == "off"
    path = _file(tmp_path, "")
    assert read_run_config(path, [("truncation.mode", "off")]).truncation.mode == "off"


@pytest.mark.fault(39, "dotted keys in the file, alone and beside nested ones")
@pytest.mark.parametrize(
    "text",
    [
        "search.prune_ratio: 0.3\nsearch.elbow.margin: 0.2\nsearch.ratios.layer4.*: 0.7\n",
        "search: {prune_ratio: 0.3, elbow.margin: 0.2, ratios.layer4.*: 0.7}\n",
        "search: {prune_ratio: 0.3, ratios: {layer4.*: 0.7}}\nsearch.elbow: {margin: 0.2}\n",
    ],
)
def test_a_file_may_have_dotted_keys(tmp_path: Path, text: str) -> None:
    """The message asked whether the same key was meant."""
    search = read_run_config(_file(tmp_path, text), []).search
    assert (search.prune_ratio, search.elbow.margin) == (0.3, 0.2)
    assert search.ratios == {"layer4.*": 0.7}


@pytest.mark.fault(39, "a setting that is given both ways")
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("search.window: 3\nsearch: {window: 4}\n", "search.window"),
        ("search: {window: 4}\nsearch.window: 3\n", "search.window"),
        ("model.arguments: {a: 1}\nmodel.arguments.b: 2\n", "model.arguments"),
    ],
)
def test_a_setting_that_is_given_both_ways_is_refused(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: given twice, as a dotted key and nested"):
        read_run_config(_file(tmp_path, text), [])


@pytest.mark.fault(39, "dotted keys in Python")
def test_a_dotted_key_in_python_is_shown_nested() -> None:
    values: dict[str, Any] = {"search.elbow.margin": 0.2}
    with pytest.raises(ConfigError) as caught:
        WormConfig(**values)
    shown = "search.elbow.margin: write it nested, as search={'elbow': {'margin': ...}}"
    assert str(caught.value) == shown


@pytest.mark.fault(39, "patterns with dots, and mappings, on the command line")
def test_a_mapping_on_the_command_line_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    """It was added to it: a pattern could not be taken away, and the first that matches counts.
    A pattern with a dot was split there."""
    path = _file(
        tmp_path, "search: {ratios: {'*': 0.1, b: 0.2}, window: 4}\nmodel: {arguments: {c: 1}}\n"
    )

    def read(*pairs: tuple[str, str]) -> tuple[list[tuple[str, float]], int, Any]:
        config = read_run_config(path, pairs)
        return list(config.search.ratios.items()), config.search.window, config.model.arguments

    old = [("*", 0.1), ("b", 0.2)]
    assert read(("search.ratios", "{layer1.conv: 0.5}"))[0] == [("layer1.conv", 0.5)]
    assert read(("search.ratios", "{}"))[0] == []
    assert read(("search.ratios.layer1.conv", "0.5"))[0] == [*old, ("layer1.conv", 0.5)]
    assert read(("model.arguments", "{d: 2}")) == (old, 4, {"d": 2})
    assert read(("model.arguments.d.e", "2")) == (old, 4, {"c": 1, "d": {"e": 2}})
    assert read(("search", "{ratios: {c: 0.3}}"))[:2] == ([("c", 0.3)], 4), "a part is changed"
    assert read(("search.ratios", "{}"), ("search.ratios.c", "0.3"))[0] == [("c", 0.3)]


@pytest.mark.parametrize(
    ("text", "override", "ratio", "budget"),
    [
        ("search.prune_ratio: 0.3", ("search.budget.flops", "0.25"), 0.5, ("flops", 0.25)),
        ("search.prune_ratio: 0.3", ("search", "{budget: {bytes: 0.5}}"), 0.5, ("bytes", 0.5)),
        ("search: {budget: {flops: 0.25}, window: 4}", ("search.prune_ratio", "0.3"), 0.3, None),
        ("search.budget.flops: 0.25", ("search.budget.flops", "0.5"), 0.5, ("flops", 0.5)),
        ("search.budget.flops: 0.25", ("search.budget.flops", "null"), 0.5, None),
    ],
)
def test_on_the_command_line_a_budget_replaces_the_ratio_of_the_file_and_vice_versa(
    text: str,
    override: tuple[str, str],
    ratio: float,
    budget: tuple[str, float] | None,
    tmp_path: Path,
) -> None:
    search = read_run_config(_file(tmp_path, text), [override]).search
    assert (search.prune_ratio, search.budget.chosen) == (ratio, budget)
    assert search.window == (4 if "window" in text else 5)


def test_both_on_the_command_line_or_both_in_the_file_contradict(tmp_path: Path) -> None:
    both = [("search.prune_ratio", "0.3"), ("search.budget.flops", "0.25")]
    for text, overrides in (("", both), ("search: {prune_ratio: 0.3, budget.flops: 0.25}", [])):
        with pytest.raises(ConfigError, match=r"budget flops 0\.25 contradicts prune_ratio 0\.3"):
            read_run_config(_file(tmp_path, text), overrides)
