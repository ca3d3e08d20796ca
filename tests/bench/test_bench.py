"""The benchmarks find what they should find at all; how fast anything is, no test says."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from tests.programs import call
from tests.ranks import Ranks
from worm_dist.bench import workload
from worm_dist.bench.hiccup import hiccup
from worm_dist.bench.overhead import overhead
from worm_dist.bench.report import read_panels, show, write_panels
from worm_dist.bench.results import Panel, Row, Spread
from worm_dist.bench.step import step
from worm_dist.bench.variants import Step, Variant
from worm_dist.bench.workload import Workload, alternate
from worm_dist.errors import CheckpointError
from worm_dist.models import build_model

pytestmark = pytest.mark.slow("runs benchmarks, ten seconds")

ROOT = Path(__file__).parents[2]
NETLAB = (ROOT / "launch" / "netlab", "--rate", "unlimited", "--")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


class _Tiny(Workload):
    """Of two narrow layers: what is taken is every step, not much time."""

    def build(self) -> nn.Module:
        return build_model(self.model, 10, 3, {"widths": [8, "M", 16]})


TINY = _Tiny("vgg_small", "vgg_small", rounds=2)

HELD = {f"worm {percent} %": percent / 100 for percent in (100, 75, 50, 25, 10)}
SHARES = {
    "DDP": 1,
    "fp16 hook": 0.5,
    "bf16 hook": 0.5,
    "PowerSGD rank 1": None,
    "PowerSGD rank 4": None,
    **{
        name + suffix: share * width
        for name, share in HELD.items()
        for suffix, width in (("", 1), (" bf16", 0.5))
    },
    "worm 50 % faded": 0.25,
    "worm 50 % faded bf16": 0.125,
    "worm 50 % PowerSGD": None,
}
"""Of the bytes of plain DDP, as far as arithmetic tells."""
VARIANTS = list(SHARES)


def _call(command: Sequence[Any], folder: Path) -> subprocess.CompletedProcess[str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {key: os.environ[key] for key in os.environ if key not in launcher}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def _spreads(row: Row) -> list[float]:
    return [*dataclasses.astuple(row.value), *dataclasses.astuple(row.ratio)]


@pytest.mark.slow("runs a benchmark on real ranks")
def test_frozen_rows_are_not_on_the_wire(tmp_path: Path) -> None:
    has_netlab = _call([*NETLAB, "true"], tmp_path).returncode == 0
    launcher = (*NETLAB, sys.executable) if has_netlab else TORCHRUN
    done = _call([*launcher, "-m", "worm_dist", "bench", "wire", "--quick"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert all(f"\n{name} " in done.stdout for name in VARIANTS)
    assert ("both ranks are on one host" in done.stdout) != has_netlab

    folder = tmp_path / "runs" / "bench-quick"
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    (panel,) = read_panels(folder)
    assert panel.key == "wire"
    assert [row.name for row in panel.rows] == VARIANTS
    assert all(math.isfinite(value) and value > 0 for row in panel.rows for value in _spreads(row))
    for row in panel.rows:
        assert row.ideal == pytest.approx(SHARES[row.name], abs=0.01)
        if row.ideal is not None:
            assert row.sent_share == pytest.approx(row.ideal, rel=1e-9)
        # Others may use the loopback at the same time, but nobody else is in the namespaces.
        if has_netlab and row.ideal is not None:
            assert row.ratio.median == pytest.approx(row.ideal, abs=0.01)
    sent = {row.name: row.sent_share for row in panel.rows}
    assert sent["PowerSGD rank 1"] is sent["PowerSGD rank 4"] is None
    share = sent["worm 50 % PowerSGD"]
    assert share is not None and 0 < share < 0.05


def _step() -> Panel:
    return step(TINY)


def _overhead() -> Panel:
    return overhead(TINY)


def _hiccup() -> Panel:
    return hiccup(TINY)


def _panels(ranks: Ranks, measure: Callable[[], Panel]) -> list[Panel]:
    """Of both ranks.  Eighteen trainings in one process take their time on a busy machine."""
    outcomes = ranks.outcomes(2, measure)
    assert [outcome.exitcode for outcome in outcomes] == [0, 0], "\n".join(map(str, outcomes))
    return [outcome.value for outcome in outcomes]


@pytest.mark.slow("takes steps of every variant on real ranks")
def test_every_variant_takes_its_steps(ranks: Ranks) -> None:
    panel, other = _panels(ranks, _step)
    assert panel.rows == other.rows
    assert [row.name for row in panel.rows] == VARIANTS
    assert all(math.isfinite(value) and value > 0 for row in panel.rows for value in _spreads(row))
    assert panel.rows[0].ratio == Spread(1, 1, 1)


@pytest.mark.slow("checks a VGG on real ranks")
def test_a_check_is_three_collectives(ranks: Ranks) -> None:
    panel, _ = _panels(ranks, _overhead)
    names = ["DDP", "DDP again", "engine attached", "engine and its L1 penalty"]
    assert [row.name for row in panel.rows] == names
    assert panel.figures["collectives of a check"] == 3
    assert all(math.isfinite(value) and value > 0 for value in panel.figures.values())


@pytest.mark.slow("takes whole runs on real ranks")
def test_hiccups_are_measured_beside_dense_steps(ranks: Ranks) -> None:
    panel, other = _panels(ranks, _hiccup)
    assert panel.rows == other.rows
    assert [row.name for row in panel.rows] == [
        "DDP",
        "check",
        "check that starts truncation",
        "step after it",
        "first stage of the draw",
        "step after a stage",
        "later stage of the draw",
    ]
    assert all(math.isfinite(value) and value > 0 for row in panel.rows for value in _spreads(row))
    assert panel.figures["check that starts truncation, in other checks"] > 0


def _slow_on_rank_one() -> tuple[int, int]:
    """Rounds with little and with much patience."""
    seconds = 0.05 * dist.get_rank()
    variant = Variant("sleeper", lambda: None, lambda: None, None)

    def measure(step: Step) -> float:
        time.sleep(seconds)
        return seconds

    workload._TIME_LIMIT = 0.25
    (few,) = alternate([variant], 50, measure)
    workload._TIME_LIMIT = 60.0
    (all_,) = alternate([variant], 10, measure)
    return len(few), len(all_)


def test_a_slow_network_has_fewer_rounds_on_both_ranks(ranks: Ranks) -> None:
    """The ranks would wait for one another for ever if they did not agree how many there are."""
    mine, other = ranks(2, _slow_on_rank_one)
    assert mine == other
    assert 3 <= mine[0] <= 5 and mine[1] == 10


def _found(key: str, seconds: float = 1.0) -> Panel:
    row = Row("DDP", Spread(seconds, seconds, seconds), Spread(1, 1, 1), None, None)
    return Panel(key, f"title of {key}", "s", (row,), {"network": "none"})


def test_a_folder_collects_what_was_found_newest_first_told_slowest_first_shown(
    tmp_path: Path,
) -> None:
    keys = [
        "hiccup",
        "overhead",
        "step unlimited",
        "step 1gbit",
        "step 100mbit",
        "wire",
        "step 500mbit",
    ]
    for key in keys:
        write_panels(tmp_path, read_panels(tmp_path), _found(key))
    write_panels(tmp_path, read_panels(tmp_path), _found("step 1gbit", seconds=2))
    panels = read_panels(tmp_path)
    assert [panel.key for panel in panels] == [
        "wire",
        "step 100mbit",
        "step 500mbit",
        "step 1gbit",
        "step unlimited",
        "overhead",
        "hiccup",
    ]
    assert panels[3] == _found("step 1gbit", seconds=2)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"panels": [{"key": "wire"}]}'])
def test_a_file_of_another_kind_is_not_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(CheckpointError, match="remove it or choose another --out"):
        read_panels(tmp_path)


def test_the_table_is_plain_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    show(_found("wire"), out)
    assert "title of wire" in out.getvalue() and "network: none" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_quartiles_are_those_of_the_values() -> None:
    assert Spread.of([5, 1, 2, 3, 4]) == Spread(3, 2, 4)
    assert json.loads(json.dumps(_found("wire").as_json()))["rows"][0]["value"]["median"] == 1


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["wire"], 6, "bench: it needs exactly 2 ranks, but there are 1;"),
        (["wires"], 2, "invalid choice: 'wires'"),
        (["wire", "--steps", "3"], 2, "unrecognized arguments: --steps 3"),
        (["wire", "--rounds", "1"], 2, "--rounds: 1 is too small; give at least 2"),
    ],
)
def test_a_users_mistake_is_told(tmp_path: Path, words: list[str], code: int, says: str) -> None:
    (ended,) = call(["-m", "worm_dist", "bench", *words], tmp_path)
    assert ended.exitcode == code
    assert says in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "runs").exists()
