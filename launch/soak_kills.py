"""Soak: random kills and restarts of one run, which must end like an uninterrupted run."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from worm_dist.checkpoint.manager import CheckpointManager

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "digits.yaml")
SETTINGS = ("--checkpoint.every", "7ba")
"""Not a divisor of an epoch, so that most runs resume in the middle of one."""
WAYS = ("SIGKILL a rank", "SIGTERM a rank", "SIGTERM all", "SIGKILL the launcher", "SIGTERM it")
LIMIT_SECONDS = 300
"""Limit on an uninterrupted run, and on the end of a run after a signal."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a run again and again.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("settings", nargs="*", help="after --, for the run")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    draws, began = random.Random(options.seed), time.monotonic()
    unbroken = options.out / "unbroken"
    seconds = _to_the_end(unbroken, options)
    wanted, done, broken, ended = end_of(unbroken), Counter[str](), options.out / "broken", 0
    while done.total() < options.kills and time.monotonic() - began < options.seconds:
        way = draws.choice(WAYS)
        if _killed(broken, options, way, draws, seconds):
            done[way] += 1
        if (broken / "result.json").exists():
            ended += 1
            if not _equal(broken, wanted):
                return 1
            shutil.rmtree(broken)
    if broken.exists():
        _to_the_end(broken, options)
        ended += 1
        if not _equal(broken, wanted):
            return 1
    ways = ", ".join(f"{way} {count}" for way, count in sorted(done.items()))
    print(f"soak: {done.total()} kills ({ways}) of {ended} runs: all ended like the unbroken one")
    return 0


def _start(out: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "worm_dist", "train", CONFIG, "--out", str(out), *SETTINGS, *options.settings),
    ]
    log = (options.out / "log.txt").open("ab")
    # In a session of its own, so that all of its processes can be killed.
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _to_the_end(out: Path, options: argparse.Namespace) -> float:
    """Run to the end without a kill; return the seconds that it took."""
    began = time.monotonic()
    code = _start(out, options).wait(LIMIT_SECONDS)
    assert code == 0, f"the run failed; see {options.out / 'log.txt'}"
    return time.monotonic() - began


def _killed(
    out: Path, options: argparse.Namespace, way: str, draws: random.Random, seconds: float
) -> bool:
    """Start or resume a run and kill it; return whether it was still running."""
    launcher, before = _start(out, options), _checkpoints(out)
    # A fifth of the kills come during the start, the others after a new checkpoint.
    patience = 0.3 * seconds * draws.random() if draws.random() < 0.2 else LIMIT_SECONDS
    _wait(launcher, patience, lambda: _checkpoints(out) - before)
    _wait(launcher, draws.uniform(0, 0.2 * seconds), set)
    ranks = _children(launcher.pid)
    there = launcher.poll() is None and len(ranks) == 2
    if there:
        for pid in _victims(way, launcher.pid, ranks, draws):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if "SIGKILL" in way else signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        # Ranks whose launcher was killed would train to the end, so they are killed below.
        launcher.wait(0 if "launcher" in way else LIMIT_SECONDS if there else 0)
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    return there


def _wait(launcher: subprocess.Popen[bytes], seconds: float, seen: Callable[[], set[str]]) -> None:
    """Wait for at most these seconds, until ``seen`` is not empty or the run has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and launcher.poll() is None and not seen():
        time.sleep(0.02)


def _checkpoints(out: Path) -> set[str]:
    return {path.name for path in (out / "checkpoints").glob("step-*")}


def _victims(way: str, launcher: int, ranks: list[int], draws: random.Random) -> list[int]:
    if way.endswith("a rank"):
        return [draws.choice(ranks)]
    return ranks if way.endswith("all") else [launcher]


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


# ---- comparing -----------------------------------------------------------------------------------


def end_of(run: Path) -> dict[str, Any]:
    """Everything by which two ends are compared, without measured times."""
    newest = CheckpointManager(run / "checkpoints").newest()
    assert newest is not None
    state = newest.read("run")
    result = json.loads((run / "result.json").read_text())
    del state["phase_stats"]["run_seconds"], state["phase_stats"]["phase_seconds"]
    del state["result"]["seconds"], result["seconds"]
    return {
        "checkpoint": state,
        "result.json": result,
        "journal.jsonl": (run / "journal.jsonl").read_text(),
        "ticket": {path.name: path.read_bytes() for path in (run / "ticket").iterdir()},
    }


def _equal(run: Path, wanted: dict[str, Any]) -> bool:
    odd = _difference(end_of(run), wanted)
    if odd:
        print(f"soak: {run} ended otherwise: {odd}")
    return not odd


def _difference(one: Any, other: Any) -> str:
    """The first place at which two nested values differ; "" if they are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
        return "" if same else "a tensor"
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        places = ((f"{key}", one[key], other[key]) for key in one)
    elif (
        isinstance(one, (list, tuple))
        and isinstance(other, (list, tuple))
        and len(one) == len(other)
    ):
        places = ((f"{n}", *pair) for n, pair in enumerate(zip(one, other)))
    else:
        return "" if one == other else f"{str(one)[:60]} is not {str(other)[:60]}"
    for place, *pair in places:
        odd = _difference(*pair)
        if odd:
            return f"{place}: {odd}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
