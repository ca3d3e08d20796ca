"""The examples run, on two real processes each, as torchrun would start them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.programs import call, variables_of_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow("trains a whole run")
@pytest.mark.timeout(110)
def test_the_loop_leaves_a_small_network(tmp_path: Path) -> None:
    script = EXAMPLES / "loop_digits.py"
    first, second = call([script], tmp_path, variables_of_ranks(2))
    assert (first.exitcode, second.exitcode) == (0, 0), first.err + second.err
    assert "epoch 10 ticket" in first.out
    left = re.search(r"([\d,]+) parameters are left", first.out)
    assert left is not None and int(left[1].replace(",", "")) < 0.45 * 94_000
    assert (tmp_path / "ticket" / "ticket.safetensors").exists()


@pytest.mark.slow("trains a whole run and imports a trainer")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "extra", "world_size"),
    [
        ("lightning", "lightning", 0),  # it starts the second process itself
        ("huggingface", "hf", 2),
        ("accelerate", "hf", 2),
    ],
)
def test_it_ends_with_a_ticket(name: str, extra: str, world_size: int, tmp_path: Path) -> None:
    for package in {"lightning": ["lightning"], "hf": ["accelerate", "transformers"]}[extra]:
        pytest.importorskip(package, reason=f"the extra worm_dist[{extra}] is not installed")
    script = EXAMPLES / f"{name}_digits.py"
    assert len(script.read_text().splitlines()) < 40
    ranks = variables_of_ranks(world_size) or [{}]
    ended = call([script], tmp_path, ranks, limit=280)
    assert [each.exitcode for each in ended] == [0] * len(ended), ended[0].err
    assert [line for line in ended[0].out.splitlines() if line.startswith("ticket ")], ended
