"""Every setting acts: another value of it changes what a run does.

A setting that nothing reads fails here, without a line for it: the other value is made from its
type.  Only where that value would be invalid, or needs another setting to act, there is a row.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import NO_GROUP, Ranks
from tests.training.observed import (
    WITHOUT_SPACE,
    Different,
    events_of,
    exit_code_of,
    write_images,
)
from worm_dist.interval import Interval
from worm_dist.presets import merge
from worm_dist.settings import Settings
from worm_dist.training.run_config import RunConfig

ROOT = Path(__file__).parents[2]
HERE = "tests.training.observed"
BASE: dict[str, Any] = {
    "epochs": 3,
    "data": {"name": f"{HERE}:small", "batch_size": 16},
    "model": {"arguments": {"widths": [12, "M", 10]}},
    "search": {"every": "2ba", "window": 3, "settled": 0.3, "elbow": {"latest": None}},
    "truncation": {"removal": {"duration": "4ba", "fade_steps": 2}},
    "ticket": {"round_to": 2},
}
"""Twelve steps; the elbow is after six, a stage after eight, the ticket after ten."""


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Of each setting, whether its other value makes a difference."""
    folder = tmp_path_factory.mktemp("settings")
    (outcome,) = Ranks(folder).outcomes(NO_GROUP, _all, folder)
    assert outcome.exitcode == 0, outcome.traceback
    found: dict[str, bool] = outcome.value
    return found


def _of(key: str, value: Any) -> dict[str, Any]:
    """A dotted key and its value, nested."""
    first, _, rest = key.partition(".")
    return {first: _of(rest, value) if rest else value}


_RESIDUAL = {"model": {"name": f"{HERE}:residual"}}
_IMAGES = {"data": {"name": "image-folder", "root": "../images", "image_size": 8}}
_HALF = {"data": {**_IMAGES["data"], "mean": 0.5, "std": 0.5}}
_STEP = {"schedule": {"name": "step", "milestones": [1]}}
_NEVER_SETTLED = {"search": {"window": 9}}
_FOLLOWING = {**_NEVER_SETTLED, "truncation": {"mode": "soft", "ratio": "distance"}}
_RISING_LOSS = {
    "epochs": 6,
    "data": {"name": f"{HERE}:turning"},
    "truncation": {"removal": {"pause_above": 1.0, "duration": "14ba"}},
}
COMPANIONS: Mapping[str, dict[str, Any]] = {
    "checkpoint.keep_last": {"checkpoint": {"every": "2ba"}},
    "checkpoint.on_error": {WITHOUT_SPACE: True},
    "data.augment": _IMAGES,
    "data.image_size": _IMAGES,
    "data.mean": _HALF,
    "data.root": _IMAGES,
    "data.std": _HALF,
    "distributed.deepspeed": {"distributed": {"backend": "deepspeed", "deepspeed": "missing"}},
    "retraining.until_accuracy": {"retraining": {"epochs": 3}},
    "schedule.gamma": _STEP,
    "schedule.milestones": _STEP,
    "search.coupling": _RESIDUAL,
    "search.elbow.min_masks": _NEVER_SETTLED,
    "search.elbow.fraction": {"search": {"elbow": {"rule": "relative"}}},
    "search.grouping": _RESIDUAL,
    "ticket.recalibrate_memory_mb": {"data": {"name": f"{HERE}:wide"}},
    "truncation.compression_rank": {"truncation": {"compression": "powersgd"}},
    "truncation.near_distance": _FOLLOWING,
    "truncation.near_ratio": merge(_FOLLOWING, {"truncation": {"near_distance": 1.0}}),
    "truncation.ratio": {**_NEVER_SETTLED, "truncation": {"mode": "soft"}},
    "truncation.removal.patience": _RISING_LOSS,
    "truncation.removal.pause_above": _RISING_LOSS,
}
"""Settings without which another one has no effect; both runs have them."""
REFUSED = ("checkpoint.on_error", "distributed.deepspeed")
"""The runs of these fail: what they say differs."""
ELSEWHERE: Mapping[str, str] = {"truncation.checksums": "tests/dist/test_checksums.py"}
"""Settings that act on several ranks only, and the test of each."""
OTHERS: Mapping[str, Any] = {
    "checkpoint.keep_last": 2,
    "data.batch_size": 8,
    "data.image_size": 9,
    "data.name": f"{HERE}:wide",
    "data.root": "../others",
    "distributed.backend": "nccl",
    "distributed.deepspeed": "absent",
    "model.arguments": {"widths": [12, "M", 8]},
    "model.name": f"{HERE}:residual",
    "model.num_classes": 50,
    "model.weights": "absent.pt",
    "name": "another",
    "retraining.epochs": 1,
    "retraining.until_accuracy": 0.01,
    "schedule.milestones": [2],
    "schedule.name": "constant",
    "search.dense": ["features.0"],
    "search.importance": "weight_norm",
    "search.min_keep_ratio": 0.5,
    "search.ratios": {"features.0": 0.25},
    "search.window": 2,
    "ticket.recalibrate_batches": 1,
    "ticket.recalibrate_memory_mb": 1,
    "truncation.near_distance": 1.0,
    "truncation.removal.patience": "1ba",
    "truncation.removal.pause_above": 9.0,
    "truncation.removal.stage": 1.0,
}
"""Other values, where none can be made from the type, or it would change nothing here."""


def _leaves(part: type[Settings], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every dotted key with the type and the default of its value."""
    for name, field in part.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind, field.default


SETTINGS = {key: (kind, default) for key, kind, default in _leaves(RunConfig)}


def _another(value: Any, kind: Any) -> Any:
    """Another value of a type."""
    if typing.get_origin(kind) is typing.Literal:
        values = typing.get_args(kind)
        return values[(values.index(value) + 1) % len(values)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.5
    kinds = (kind, *typing.get_args(kind))
    if Interval in kinds:
        return "3ba"
    if float in kinds or any(typing.get_args(each)[:1] == (float,) for each in kinds):
        return 0.5
    raise AssertionError(f"no other value than {value!r} is known for {kind}: add it to OTHERS")


def _value(values: Mapping[str, Any], key: str, default: Any) -> Any:
    for part in key.split("."):
        if part not in values:
            return default
        values = values[part]
    return values


def _all(folder: Path) -> dict[str, bool]:
    for seed, name in enumerate(("images", "others")):
        write_images(folder / name, seed)
    differs: dict[str, bool] = {}
    bases: dict[str, list[Any]] = {}
    for key, (kind, default) in SETTINGS.items():
        base = merge(BASE, COMPANIONS.get(key, {}))
        expected = bases.get(repr(base))
        if expected is None:
            expected = bases[repr(base)] = events_of(base, _empty(folder / f"without {key}"))
            assert (exit_code_of(expected) != 0) == (key in REFUSED), (key, expected[-2:])
        other = OTHERS[key] if key in OTHERS else _another(_value(base, key, default), kind)
        try:
            events = events_of(merge(base, _of(key, other)), _empty(folder / key), expected)
            differs[key] = events != expected
        except Different:
            differs[key] = True
    return differs


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.slow("trains a hundred short runs")
@pytest.mark.parametrize("key", [key for key in SETTINGS if key not in ELSEWHERE])
def test_another_value_makes_a_difference(acts: dict[str, bool], key: str) -> None:
    assert acts[key], f"{key}: nothing that a run does depends on it"


def test_rows_are_of_settings() -> None:
    """A row of a setting that is gone, or that another row contradicts."""
    assert {*COMPANIONS, *OTHERS, *ELSEWHERE} <= SETTINGS.keys()
    assert all((ROOT / path).is_file() for path in ELSEWHERE.values())
