"""The examples run, on two real processes each, as torchrun would start them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import call, variables_of_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow("trains a whole run")
def test_the_loop_leaves_a_small_network(tmp_path: Path) -> None:
    script = EXAMPLES / "loop_digits.py"
    first, second = call([script], tmp_path, variables_of_ranks(2))
    assert (first.exitcode, second.exitcode) == (0, 0), first.err + second.err
    assert "epoch 10 ticket" in first.out
    left = re.search(r"([\d,]+) parameters are left", first.out)
    assert left is not None and int(left[1].replace(",", "")) < 0.45 * 94_000
    assert (tmp_path / "ticket" / "ticket.safetensors").exists()


@pytest.mark.slow("trains a whole run and imports a trainer")
@pytest.mark.parametrize("name", ["huggingface", "accelerate"])
def test_it_ends_with_a_ticket(name: str, tmp_path: Path) -> None:
    for package in ("accelerate", "transformers"):
        pytest.importorskip(package, reason="the extra worm_dist[hf] is not installed")
    first, second = call([_short(name)], tmp_path, variables_of_ranks(2))
    assert (first.exitcode, second.exitcode) == (0, 0), first.err + second.err
    _require_a_ticket(first.out)


@pytest.mark.slow("trains a whole run and imports Lightning")
def test_it_ends_with_a_ticket_under_lightning(tmp_path: Path) -> None:
    """Lightning starts the second process itself, and warns of loaders without workers."""
    pytest.importorskip("lightning", reason="the extra worm_dist[lightning] is not installed")
    ended = subprocess.run(
        [sys.executable, _short("lightning")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    _require_a_ticket(ended.stdout)


def _short(name: str) -> Path:
    script = EXAMPLES / f"{name}_digits.py"
    assert len(script.read_text().splitlines()) < 40
    return script


def _require_a_ticket(printed: str) -> None:
    assert [line for line in printed.splitlines() if line.startswith("ticket ")], printed
