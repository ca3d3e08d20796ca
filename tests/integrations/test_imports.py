"""Other trainers are imported by those alone who use them."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, worm_dist
worm_dist.attach, worm_dist.load_ticket
sys.exit(bool({"accelerate", "lightning", "transformers"} & sys.modules.keys()))
"""


@pytest.mark.slow("imports torch anew")
def test_worm_dist_imports_no_trainer() -> None:
    assert subprocess.run([sys.executable, "-c", PROGRAM]).returncode == 0
