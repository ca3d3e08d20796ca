"""The examples run, on two real processes each."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import call, variables_of_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


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


@pytest.mark.slow("trains a whole run under a launcher")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "extra", "launcher"),
    [
        ("lightning", "lightning", []),  # which starts the second process itself
        ("huggingface", "hf", _TORCHRUN),
        ("accelerate", "hf", _TORCHRUN),
    ],
)
def test_it_ends_with_a_ticket(name: str, extra: str, launcher: list[str], tmp_path: Path) -> None:
    for package in {"lightning": ["lightning"], "hf": ["accelerate", "transformers"]}[extra]:
        pytest.importorskip(package, reason=f"the extra worm_dist[{extra}] is not installed")
    script = EXAMPLES / f"{name}_digits.py"
    assert len(script.read_text().splitlines()) < 40
    ended = subprocess.run(
        [sys.executable, *launcher, script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if line.startswith("ticket ")], ended.stdout
