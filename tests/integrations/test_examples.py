"""The examples run, on two real processes each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


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
