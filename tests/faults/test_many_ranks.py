"""As many ranks as a machine can hold, and one of them is killed.

Only with MANY_RANKS in the environment, which says how many, such as 64: that takes some minutes on
two cores, and about 100 MB for each rank.  With ``-s`` the times are printed.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.driver import STEP, STRUCK, Act, Driver, Fault, Run
from worm_dist.training.data import Data
from worm_dist.training.data.digits import load
from worm_dist.training.run_config import DataConfig

WORLD_SIZE = int(os.environ.get("MANY_RANKS", "0"))
VICTIM, STEP_OF_DEATH = 17, 25

pytestmark = [
    pytest.mark.skipif(not WORLD_SIZE, reason="MANY_RANKS is not set"),
    pytest.mark.slow("minutes, and 100 MB for each rank"),
    pytest.mark.timeout(3000),
]

GROUP = "worm_dist.training.run:process_group"


def _read(file: Path, rank: int) -> Data:
    """The digits, without importing scikit-learn on every rank."""
    data: Data = pickle.loads(file.read_bytes())
    return data


def _tell(what: str, real: Act, *args: Any) -> Any:
    """On standard output, which the driver keeps: the time, memory and files of this rank."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    files = len(os.listdir("/proc/self/fd"))
    sys.stdout.write(f"{what} {time.time():.3f} {memory} {files}\n")
    sys.stdout.flush()
    return real(*args)


def _die(real: Act, *args: Any) -> Any:
    return _tell("dies", Fault.kill(VICTIM, STEP_OF_DEATH).act, real)


def _told(printed: str, what: str) -> list[float]:
    return [float(word) for word in re.findall(rf"{what} (\S+) (\S+) (\S+)", printed)[0]]


@pytest.mark.fault(3, "one of many ranks is killed")
def test_one_of_many_ranks_is_killed(driver: Driver, tmp_path: Path) -> None:
    file = tmp_path / "digits.pickle"
    file.write_bytes(pickle.dumps(load(DataConfig())))
    settings = {
        "preset": "worm",
        "epochs": 4,
        "search.every": "5ba",
        "data.batch_size": 2 * WORLD_SIZE,
        "distributed.startup_timeout_seconds": 1500,
        "distributed.timeout_seconds": 300,
    }
    faults = (
        Fault.do(functools.partial(_tell, "begins"), rank=None, step=1).at(GROUP),
        Fault.do(functools.partial(_tell, "steps"), rank=None, step=2).at(STEP),
        Fault.do(functools.partial(_tell, "has stepped"), rank=None, step=20).at(STEP),
        Fault.do(_die, VICTIM, STEP_OF_DEATH),
    )
    ends = driver(WORLD_SIZE, Run(faults, settings, data=functools.partial(_read, file)), 2700)
    struck = [_told(end.printed, "has stepped")[0] for end in ends]
    begun = min(_told(end.printed, "begins")[0] for end in ends)
    stepped = max(_told(end.printed, "steps")[0] for end in ends)
    memory, files = zip(*(_told(end.printed, "has stepped")[1:] for end in ends), strict=True)
    # The driver counts from the first of all faults.
    first = float((tmp_path / STRUCK).read_text())
    death = _told(ends[VICTIM].printed, "dies")[0]
    gone = [first + end.seconds - death for end in ends if end.rank != VICTIM]
    print(
        f"\n{WORLD_SIZE} ranks: {stepped - begun:.0f} s to the first step, "
        f"{(max(struck) - stepped) / 18:.2f} s a step, at most {max(memory):.0f} MB a rank, "
        f"{files[0]:.0f} files on rank zero and {max(files[1:]):.0f} on others; after the kill "
        f"the ranks were gone in {min(gone):.1f} to {max(gone):.1f} s"
    )
    assert ends.pop(VICTIM).exitcode == -9
    for end in ends:
        assert end.exitcode == 6, end
        assert "Traceback" not in end.said
        (line,) = end.errors
        assert f"step {STEP_OF_DEATH}, the gradients: rank {VICTIM} is gone" in line, line
        assert f"the stacks of {WORLD_SIZE - 1} of {WORLD_SIZE} ranks are in" in line, line
    # On few cores all of them have to write a line, and to exit.
    assert max(gone) < 10 + WORLD_SIZE / 2
