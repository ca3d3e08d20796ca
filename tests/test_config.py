from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from worm_dist import ConfigError, WormConfig
from worm_dist.__main__ import main
from worm_dist.interval import Interval
from worm_dist.presets import PRESETS

DIGITS = Path(__file__).parents[1] / "configs" / "digits.yaml"


def _mistakes(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        WormConfig(**values)
    return str(caught.value).split("\n")


def test_defaults_are_the_worm_preset() -> None:
    config = WormConfig()
    assert config == WormConfig.preset("worm")
    assert (config.search.prune_ratio, config.search.window, config.search.settled) == (0.5, 5, 0.1)
    assert (config.truncation.mode, config.truncation.frozen_weights) == ("hard", "remove")
    assert config.search.every == Interval(1, "ep")


@pytest.mark.fault(13, "all mistakes at once, each with its key")
def test_all_mistakes_are_reported_at_once() -> None:
    mistakes = _mistakes(
        search={"prune_ratio": 1.5, "window": "five", "elbow": {"rule": "knee"}},
        truncation={"removal": {"duration": "1 epoch"}},
        tickets={},
    )
    assert [line.split(":")[0] for line in mistakes] == [
        "search.prune_ratio",
        "search.window",
        "search.elbow.rule",
        "truncation.removal.duration",
        "tickets",
    ]
    assert mistakes[0].endswith("got 1.5")
    assert "'five'" in mistakes[1]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"serach": {}}, "serach: unknown key; did you mean search?"),
        (
            {"search": {"prune_ration": 0.5}},
            "search.prune_ration: unknown key; did you mean search.prune_ratio?",
        ),
        (
            {"search": {"elbow": {"min_mask": 3}}},
            "search.elbow.min_mask: unknown key; did you mean search.elbow.min_masks?",
        ),
    ],
)
@pytest.mark.fault(13, "unknown keys, with the nearest one")
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], line: str) -> None:
    assert _mistakes(**values) == [line]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"search": {"prune_ratio": 1.0}}, "search.prune_ratio"),
        ({"search": {"prune_ratio": -0.1}}, "search.prune_ratio"),
        ({"search": {"prune_ratio": float("nan")}}, "search.prune_ratio"),
        ({"search": {"prune_ratio": "0.5"}}, "search.prune_ratio"),
        ({"search": {"window": 0}}, "search.window"),
        ({"search": {"settled": 0.0}}, "search.settled"),
        ({"search": {"every": "0ep"}}, "search.every"),
        ({"search": {"every": "1.5ba"}}, "search.every"),
        ({"search": {"l1": -1.0}}, "search.l1"),
        ({"search": {"l1": float("inf")}}, "search.l1"),
        ({"search": {"enabled": "yes"}}, "search.enabled"),
        ({"truncation": {"mode": "harder"}}, "truncation.mode"),
        ({"truncation": {"ratio": 2.0}}, "truncation.ratio"),
        ({"truncation": {"compression": "powerSGD"}}, "truncation.compression"),
        (
            {"truncation": {"compression": "powersgd", "compression_rank": 0}},
            "truncation.compression_rank",
        ),
        ({"ticket": {"recalibrate_batches": -1}}, "ticket.recalibrate_batches"),
        ({"search": 5}, "search"),
        ({"search": {"window": 2**31}}, "search.window"),
        ({"search": {"window": -(10**5000)}}, "search.window"),
        ({"search": {"l1": 1e308}}, "search.l1"),
    ],
)
@pytest.mark.fault(13, "wrong types, values out of range")
def test_values_out_of_range_or_of_another_type_are_refused(
    values: dict[str, Any], key: str
) -> None:
    (line,) = _mistakes(**values)
    assert line.startswith(f"{key}: ")


@pytest.mark.fault(13, "a key that is a word of Python's own")
def test_no_key_is_taken_for_an_argument() -> None:
    """It was a TypeError: __init__() got multiple values for argument 'self'."""
    with pytest.raises(ConfigError, match="self: unknown key"):
        WormConfig(self=1)  # type: ignore[call-arg]


@pytest.mark.fault(13, "more mistakes than can be read")
def test_of_very_many_mistakes_the_first_are_told() -> None:
    mistakes = _mistakes(search={"dense": list(range(3000)), "importance": "x" * 5000})
    assert mistakes[0] == (
        "search.importance: Input should be 'auto', 'norm_scale', 'gate', 'signed_gate' or "
        f"'weight_norm', got '{'x' * 47}...{'x' * 48}'"
    )
    assert mistakes[1] == "search.dense.0: Input should be a valid string, got 0"
    assert mistakes[-1] == f"... and {3001 - len(mistakes) + 1} more"
    assert len("\n".join(mistakes)) < 2000


@pytest.mark.fault(13, "settings that contradict one another")
def test_ratio_and_floor_must_fit_together() -> None:
    (line,) = _mistakes(search={"prune_ratio": 0.8, "min_keep_ratio": 0.3})
    assert (
        line == "search: prune_ratio 0.8 and min_keep_ratio 0.3 contradict: together they exceed 1"
    )


@pytest.mark.parametrize("mode", ["soft", "off"])
def test_modes_that_freeze_nothing_have_one_scope_and_one_rule(mode: str) -> None:
    config = WormConfig(truncation={"mode": mode})
    assert (config.truncation.scope, config.truncation.frozen_weights) == ("norm", "free")
    (line,) = _mistakes(truncation={"mode": mode, "scope": "producer", "frozen_weights": "hold"})
    assert line.startswith("truncation: scope 'producer' contradicts")
    assert "frozen_weights 'hold' contradicts" in line


@pytest.mark.parametrize("compression", ["none", "bf16", "fp16"])
def test_only_powersgd_has_a_rank(compression: str) -> None:
    assert WormConfig(truncation={"compression": "powersgd"}).truncation.compression_rank == 1
    WormConfig(truncation={"compression": "powersgd", "compression_rank": 4})
    (line,) = _mistakes(truncation={"compression": compression, "compression_rank": 4})
    assert line == (
        f"truncation: compression_rank 4 contradicts compression '{compression}', which has no "
        "rank; choose compression 'powersgd'"
    )


@pytest.mark.parametrize("out", [".", "..", "/"])
@pytest.mark.fault(13, "a folder that holds more than the run")
def test_a_run_has_a_folder_of_its_own(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is there is put aside; pathlib had no name for this one, and said so."""
    assert main(["train", str(DIGITS), "--out", out]) == 2
    assert f"--out: {out} may hold more than this run" in capsys.readouterr().err


def test_presets_are_valid_and_take_changes() -> None:
    for name in PRESETS:
        assert WormConfig.preset(name, search={"prune_ratio": 0.3}).search.prune_ratio == 0.3
    paper = WormConfig.preset("worm-paper", search={"elbow": {"margin": 0.1}})
    assert (paper.search.masks_before_elbow, paper.search.elbow.margin) == (5, 0.1)
    assert (paper.truncation.mode, paper.truncation.ratio) == ("soft", 0.003)
    assert not WormConfig.preset("dense").search.enabled
    assert WormConfig.preset("early-bird").truncation.mode == "off"


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="preset: 'wurm' is none of worm, worm-paper"):
        WormConfig.preset("wurm")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        WormConfig().search.window = 3


@pytest.mark.parametrize(
    ("preset", "search"),
    [("worm-paper", {"every": "0.5ep"}), ("worm", {"budget": {"flops": 0.25}})],
)
def test_settings_round_trip_through_plain_values(preset: str, search: dict[str, Any]) -> None:
    """With a budget the ratio was written too, which contradicts it where it is read."""
    config = WormConfig.preset(preset, search=search)
    assert WormConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search": {"budget": {"flops": 0.25}, "prune_ratio": 0.5}},
            "search: budget flops 0.25 contradicts prune_ratio 0.5: it determines how many "
            "channels are dropped; give only one",
        ),
        (
            {"search": {"budget": {"bytes": 0.25}, "ratios": {"a": 0.5}}},
            "search: budget bytes 0.25 contradicts ratios {'a': 0.5}: it determines how many "
            "channels are dropped; give only one",
        ),
        (
            {"search": {"budget": {"channels": 0.25}, "grouping": "layer"}},
            "search: budget channels 0.25 contradicts grouping 'layer': where the norms of a "
            "channel disagree it is kept, so no share of them meets a budget",
        ),
        (
            {"search": {"budget": {"flops": 0.25, "parameters": 0.5}}},
            "search.budget: flops 0.25, parameters 0.5 contradict: give exactly one of them",
        ),
        (
            {"search": {"budget": {"flops": 0.0}}},
            "search.budget.flops: Input should be greater than 0, got 0.0",
        ),
        (
            {"search": {"budget": {"flop": 0.5}}},
            "search.budget.flop: unknown key; did you mean search.budget.flops?",
        ),
        (
            {"search": {"budget": {"bytes": 0.5}}, "truncation": {"compression": "powersgd"}},
            "config: search.budget.bytes contradicts truncation.compression 'powersgd', whose "
            "bytes are not in proportion to the elements; give search.budget.parameters",
        ),
    ],
)
def test_a_budget_stands_alone(changes: dict[str, Any], message: str) -> None:
    assert _mistakes(**changes) == [message]


def test_a_budget_leaves_the_default_ratio_out_of_account() -> None:
    """With a floor of 0.6 half of the channels cannot be dropped, but nobody asks for that."""
    config = WormConfig(search={"budget": {"flops": 0.9}, "min_keep_ratio": 0.6})
    assert config.search.budget.chosen == ("flops", 0.9)
    assert WormConfig().search.budget.chosen is None
