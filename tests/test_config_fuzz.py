"""Settings changed at random: a valid run comes out, or a ConfigError, and nothing else."""

from __future__ import annotations

import json
import math
import re
import resource
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.mutations import RAW, fuzzed, other_bytes, other_trees
from worm_dist import ConfigError
from worm_dist.__main__ import _parse
from worm_dist.interval import Interval
from worm_dist.presets import PRESETS
from worm_dist.training.config_file import read_run_config
from worm_dist.training.deepspeed_config import deepspeed_settings
from worm_dist.training.optim import ScheduleStart, build_optimizer, build_schedule
from worm_dist.training.resume_config import changes, fixed_settings
from worm_dist.training.run_config import RunConfig

pytestmark = pytest.mark.slow("hundreds of settings files, a quarter of a minute")

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
KEYS = sorted(RunConfig.keys())
_MOST_BYTES = 500e6
_STEPS_PER_EPOCH = 3

_NUMBERS: list[Any] = [
    *(True, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 10**400, -(10**400)),
    *(math.nan, math.inf, -math.inf, -0.0, 0.5, 5e-324, 1e308, 0.1 + 0.2),
]
_TEXTS = [
    *(
        "",
        " ",
        "x",
        "..",
        ".",
        "/",
        "-",
        "a/b",
        "~nobody",
        "runs\n",
        "\0",
        "\ufeff",
        "é",
        "é" * 150,
    ),
    *("\ud800", "\udcff", "x" * 5000, "1e5", "nan", "null", "yes", "0x10", "2024-01-01", "1:30"),
    *("0ep", "1ep", "0.1234567ep", "1234567ba", "7ba", "1.5ba", "0.0000001ep", "-1ep", "1 ep"),
    *("9" * 400 + "ep", "9" * 400 + "ba", "0." + "0" * 400 + "1ep", "١ep", "[", "*", "layer[z-a]"),
    *("worm", "worm-paper", "dense", "early-bird", "deepspeed", "step", "adamw", "bf16", "cosine"),
    *("soft", "off", "hold", "powersgd", "layer", "cifar10", "image-folder", "constant"),
]
_TREES: list[Any] = [
    *(None, [], {}, [[]], [{}], {"a": {}}, {"x": [1, "y", None]}, {1: 2}, {None: 1}, {True: 1}),
    *([3, 2], [1, 1], [2, 4], [0], [2**40], list(range(3000)), {f"k{n}": n for n in range(3000)}),
    *(date(2024, 1, 1), b"\xff", {"a"}, {"*": 0.7}, {"a": math.nan}, {"a": 10**400}, {"\ud800": 1}),
    *({"a": b"x"}, {"a": {"b", "c"}}, {"a.b": 1, "a": {"b": 2}}, {1.5: {}}, {"self": 1}),
]
_VALUES = [*_NUMBERS, *_TEXTS, *_TREES]
_NEW_KEYS = [
    *("", "self", "values", "preset", "name", "search", "<<", "__init__", "model_config", "a.b"),
    *(
        "x" * 2900,
        "x\ny",
        "é",
        "\ud800",
        "\0",
        1,
        1.5,
        math.nan,
        True,
        None,
        date(2024, 1, 1),
        b"x",
    ),
]
_RAW = [
    *(
        "*a",
        "&a [*a]",
        "&a {x: *a}",
        "[&a [1, 2], *a]",
        "{a: &a {x: 1}, b: {<<: *a, x: 2}}",
    ),
    *("{<<: {a: 1}}", "{<<: 3}", "{<<: [1]}", "{a: 1, a: 2}", "{? [1] : 2}", "{? {a: 1} : 2}"),
    *("!!python/object/apply:os.system [false]", "!!python/name:os.system", "!!python/tuple [1]"),
    *("!!binary aGVsbG8=", "!!binary é", "!!binary '@'", "!!timestamp 2001-99-99", "!!timestamp x"),
    *(
        "2001-99-99",
        "2001-12-14t21:59:43.10-99:99",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
    ),
    *(
        "!!int ''",
        "!!int x",
        "!!float ''",
        "!!float x",
        "!!bool x",
        "!!null 3",
        "!!str {}",
        "!!map x",
    ),
    *("!!seq x", "!!int [1]", "!x 1", "!<tag:yaml.org,2002:int> 1", "!" + "x" * 90_000 + " 1"),
    *("[" * 3000, "[" * 3000 + "]" * 3000, "{a: " * 3000, "- " * 3000, "[" * 30 + "]" * 30),
    *("9" * 5000, "0x" + "f" * 2900, "0b_", "0_", "1e400", "-1e400", "1" * 400),
    *("190:20:30", "1" + ":59" * 900, "1" + ":59" * 900 + ".5", "1" * 400 + ".5"),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\x41"',
        "\0",
        "\ufeff",
        "\x85",
        "\u2028",
        "'",
        '"',
        "|",
        ">",
        "@",
        "`",
    ),
    *(
        "%YAML 9.9",
        "--- a\n--- b",
        "\n---\n",
        "...",
        "? ",
        ": ",
        "&a",
        "# x",
        "\t",
        "x: y: z",
        "- - 1",
    ),
    *("[" + "x, " * 20_000 + "]", "x" * 99_000, "x" * 200_000, ", ".join("abc"), "~", ""),
]


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Whatever is read, and whatever is said of it, memory for it is small."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _MOST_BYTES / 1024


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


def _require_read(path: Path, replaced: list[tuple[str, str]]) -> None:
    """A run that holds what it promises, or words that a user can act on."""
    try:
        config = read_run_config(path, replaced)
    except ConfigError as error:
        _require_clear(str(error), path)
    else:
        _require_holds(config)


def _require_clear(text: str, path: Path) -> None:
    assert 0 < len(text) < 2000, text
    for line in text.split("\n"):
        where = line.split(": ")[0]
        named = any(where == key or where.startswith(f"{key}.") for key in KEYS)
        assert (
            named or where == str(path) or where.startswith("--") or "unknown key" in line
            or re.fullmatch(r"\.\.\. and \d+ more", line)
        ), text  # fmt: skip


def _require_holds(config: RunConfig) -> None:
    """It can be written and read back, and what follows from it can be built."""
    assert RunConfig(**json.loads(json.dumps(config.model_dump(mode="json")))) == config
    if config.distributed.backend != "deepspeed":  # whose file may not be there
        fixed = fixed_settings(config)
        assert not changes(json.loads(json.dumps(fixed, allow_nan=False)), fixed)
    assert config.worm.search == config.search
    removal = config.truncation.removal
    latest = config.search.elbow.latest
    for interval in (config.search.every, latest, removal.duration, removal.patience):
        if isinstance(interval, Interval):
            total_steps = config.epochs * _STEPS_PER_EPOCH
            assert 1 <= interval.steps(_STEPS_PER_EPOCH, total_steps) <= max(3e9, total_steps)
    timedelta(seconds=config.distributed.startup_timeout_seconds)
    torch.Generator().manual_seed(config.seed + config.epochs)
    network = nn.Linear(2, 1)
    optimizer = build_optimizer(config.optimizer, network)
    schedule = build_schedule(
        config.schedule, optimizer, ScheduleStart(config.epochs), _STEPS_PER_EPOCH
    )
    for _ in range(3):
        optimizer.zero_grad()
        (network(torch.ones(1, 2)).sum() + config.search.l1 * network.weight.sum()).backward()
        optimizer.step()
        schedule.step()
    assert all(math.isfinite(rate) for rate in schedule.get_last_lr())
    last = config.epochs * _STEPS_PER_EPOCH
    assert all(0 <= factor(last) <= 1 for factor in schedule.lr_lambdas)


@settings(fuzzed, max_examples=200)
@given(data=st.data())
def test_other_bytes_of_a_file(path: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(CONFIGS)).read_text()
    written = data.draw(
        st.sampled_from(
            [
                *[text.encode()] * 6,
                text.replace("\n", "\r\n").encode(),
                text.encode("utf-8-sig"),
                text.encode("utf-16"),
                text.replace("#", "# é").encode("latin-1", "replace"),
            ]
        )
    )
    path.write_bytes(data.draw(other_bytes(written) | st.just(written)))
    _require_read(path, [])


@settings(fuzzed, max_examples=250)
@given(data=st.data())
def test_other_values_in_a_file(path: Path, data: st.DataObject) -> None:
    tree = yaml.safe_load(data.draw(st.sampled_from(CONFIGS)).read_text())
    # What the file leaves out is there to be changed, too.
    if data.draw(st.booleans()):
        whole = RunConfig(**tree).model_dump(mode="json")
        part = data.draw(
            st.sampled_from(["search", "truncation", "schedule", "distributed", "data"])
        )
        tree[part] = whole[part]
    tree["preset"] = data.draw(st.sampled_from([*PRESETS]))
    other = data.draw(other_trees(tree, _VALUES, _NEW_KEYS))
    text = yaml.safe_dump(other, sort_keys=False, default_flow_style=data.draw(st.booleans()))
    text = text.replace(RAW, data.draw(st.sampled_from(_RAW)))
    path.write_bytes(text.encode(errors="surrogatepass"))
    _require_read(path, [])


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


_ODD_KEYS = [*KEYS, "", ".", "..", ".a", "a.", "x" * 5000, "a." * 3000 + "a", "é", "\udcff", "a\nb"]
_ODD_WORDS = st.one_of(
    st.sampled_from(_VALUES).map(_as_yaml), st.sampled_from(_RAW + _TEXTS), st.text(max_size=9)
)


@settings(fuzzed, max_examples=250)
@given(data=st.data())
def test_other_words_on_the_command_line(path: Path, data: st.DataObject) -> None:
    path.write_bytes(data.draw(st.sampled_from(CONFIGS)).read_bytes())
    words = [
        f"--{data.draw(st.sampled_from(_ODD_KEYS))}={data.draw(_ODD_WORDS)}"
        for _ in range(data.draw(st.integers(0, 1)))
    ]
    for _ in range(data.draw(st.integers(0, 2))):
        key, value = data.draw(st.sampled_from(sorted(RunConfig().flat().items())))
        below = data.draw(st.sampled_from([*[""] * 6, ".x", ".0", "." + ".x" * 30, "."]))
        alike = (
            _TEXTS if isinstance(value, str) else _TREES if isinstance(value, list) else _NUMBERS
        )
        words.append(
            f"--{key}{below}={data.draw(st.sampled_from(alike).map(_as_yaml) | _ODD_WORDS)}"
        )
    try:
        options, replaced = _parse(["train", str(path), *words])
    except ConfigError as error:
        text = str(error)
    except SystemExit:  # argparse has told mistakes in the options that it knows
        return
    else:
        _require_read(options.config, replaced)
        return
    assert "expected --key.subkey value" in text
    assert len(text) < 2000


@pytest.mark.parametrize("key", sorted(RunConfig().flat()))
def test_every_odd_value_of_one_setting(path: Path, key: str) -> None:
    path.write_text("")
    usual = RunConfig().flat()[key]
    alike = _TEXTS if isinstance(usual, str | None) else _NUMBERS
    for value in _TREES if isinstance(usual, list) else alike:
        _require_read(path, [(key, _as_yaml(value))])


_DEEPSPEED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
_DEEPSPEED_KEYS = [
    *("gradient_accumulation_steps", "bf16", "data_types", "train_batch_size", "optimizer", ""),
]


@settings(fuzzed, max_examples=100)
@given(data=st.data())
def test_other_settings_of_deepspeed(path: Path, data: st.DataObject) -> None:
    """Looked at are the keys that the run must know; the others are DeepSpeed's to judge."""
    content = data.draw(st.sampled_from(_DEEPSPEED)).read_bytes()
    plain = [*_NUMBERS, *_TEXTS, {}, [], None, {"a": 1}]
    if data.draw(st.booleans()):
        tree = {**json.loads(content), data.draw(st.sampled_from(_DEEPSPEED_KEYS)): 2}
        text = json.dumps(data.draw(other_trees(tree, plain, _DEEPSPEED_KEYS)))
        raw = data.draw(
            st.sampled_from(["NaN", "[" * 3000, '{"a":' * 99_999, "9" * 5000, "1e999", ""])
        )
        content = text.replace(f'"{RAW}"', raw).encode()
    else:
        content = data.draw(other_bytes(content))
    file = path.with_name("deepspeed.json")
    file.write_bytes(content)
    precision = data.draw(st.sampled_from(["fp32", "tf32", "bf16"]))
    config = RunConfig(
        precision=precision, distributed={"backend": "deepspeed", "deepspeed": str(file)}
    )
    try:
        found = deepspeed_settings(config, world_size=2)
    except ConfigError as error:
        text = str(error)
    else:
        assert not changes(json.loads(json.dumps(fixed_settings(config))), fixed_settings(config))
        passes = found.get("gradient_accumulation_steps", 1)
        assert found["train_micro_batch_size_per_gpu"] * passes * 2 == config.data.batch_size
        return
    assert "distributed.deepspeed: " in text or "data.batch_size: " in text
    assert len(text) < 2000
