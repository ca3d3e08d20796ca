"""Steps on several ranks: the bytes are those of the formula, to the element."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.bench.test_bench import TINY
from tests.ranks import Ranks
from worm_dist.__main__ import main
from worm_dist.bench.json_lines import append
from worm_dist.bench.network import Link, rate_text
from worm_dist.bench.scaling.measurement import measure
from worm_dist.bench.scaling.page import PAGE, write
from worm_dist.bench.scaling.row import CHECK, ScaleRow, read_scale_rows
from worm_dist.errors import CheckpointError


def _rows() -> list[ScaleRow]:
    rows = list(measure(TINY))
    assert dist.get_world_size() == rows[0].ranks
    return rows


@pytest.mark.slow("trains on two and three ranks")
@pytest.mark.parametrize("size", [2, 3])
def test_the_payload_is_that_of_the_elements(ranks: Ranks, size: int) -> None:
    numel = sum(p.numel() for p in TINY.build().parameters())
    for rows in ranks(size, _rows):
        plain, frozen, drawn, check = rows
        assert [row.variant for row in rows] == ["DDP", "half frozen", "half drawn", CHECK]
        assert plain.payload_bytes == 4 * numel
        # Filters 8 of 3x3x3, 16 of 8x3x3; a scale and a shift each; the classifier stays.
        classifier = 16 * 10 + 10
        assert numel == 8 * 27 + 2 * 8 + 16 * 72 + 2 * 16 + classifier
        assert frozen.payload_bytes == 4 * (4 * 27 + 2 * 4 + 8 * 72 + 2 * 8 + classifier)
        assert drawn.payload_bytes == 4 * (4 * 27 + 2 * 4 + 8 * 36 + 2 * 8 + 8 * 10 + 10)
        assert check.collectives == 3
        for row in rows:
            assert row.ring_bytes == 2 * (size - 1) / size * row.payload_bytes
            assert row.seconds > 0
            # The loopback has no limited rate, and counts all traffic of the machine.
            assert (row.nominal_estimate_seconds, row.wire_bytes, row.packets) == (None, 0, 0)
            assert row.bits_per_second > 0
            assert (row.estimate_seconds is None) == (row.variant == CHECK)
            assert row.estimate_seconds is None or row.estimate_seconds >= row.compute_seconds


def _sharded_rows() -> list[ScaleRow]:
    return list(measure(TINY, "fsdp"))


@pytest.mark.slow("trains on two ranks")
def test_sharded_steps_also_send_weights(ranks: Ranks) -> None:
    """The network is one unit, so weights are gathered once, a half from each rank."""
    numel = sum(p.numel() for p in TINY.build().parameters())
    for outcome in ranks.outcomes(2, _sharded_rows):
        assert outcome.exitcode == 0, str(outcome)
        rows = outcome.value
        dense, frozen, left, drawn, _ = rows
        assert [row.variant for row in rows[:2]] == ["fully_shard", "half frozen, fsdp"]
        assert dense.payload_bytes == 4 * (numel + numel // 2)
        assert drawn.payload_bytes <= left.payload_bytes < frozen.payload_bytes
        # gloo reduce-scatters by an all-reduce, which sends on two ranks what a rank has.
        assert dense.ring_bytes == dense.payload_bytes and dense.collectives == 2
        assert all(
            row.estimate_seconds >= row.compute_seconds for row in rows[:-1] if row.estimate_seconds
        )


def _row(ranks: int, estimate: float | None = 0.09) -> ScaleRow:
    figures = (1, 800, 800.0, 900.0, 3, 0.1, 0.02, 5e-5, 62.5e6, estimate, 0.08)
    return ScaleRow("vgg", "DDP", ranks, "100mbit", *figures)


def test_the_page_has_the_newest_rows(tmp_path: Path) -> None:
    path = tmp_path / "scale.jsonl"
    for row in (_row(2, None), _row(4), _row(2)):
        append(path, row)
    text = write(tmp_path, read_scale_rows(path))
    assert (tmp_path / PAGE).read_text() == text
    assert "| vgg | DDP | 2 | 1 | 800 | 800 | 900 | 3 |" in text
    assert "| DDP | 20.0 | 50 | 62 | 100.0 | 90.0 | 0.90 | 80.0 | 0.80 |" in text
    path.write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"scale\.jsonl was not written by this version"):
        read_scale_rows(path)


def test_a_single_rank_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "scale", "--out", str(tmp_path)]) == 6
    assert "it needs several ranks, but there is one" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("network", "seen"),
    [
        ("100mbit", (1e8, "100 Mbit/s")),
        ("1gbit", (1e9, "1 Gbit/s")),
        ("64kbit", (64e3, "64 Kbit/s")),
        ("unlimited", (None, "an unlimited link")),
        ("lo", (None, "lo")),
    ],
)
def test_rates_are_read(
    monkeypatch: pytest.MonkeyPatch, network: str, seen: tuple[float | None, str]
) -> None:
    monkeypatch.setenv("NETLAB_RATE", network)
    assert (Link().bits_per_second, rate_text(network)) == seen
