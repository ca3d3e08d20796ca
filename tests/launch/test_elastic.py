"""A run under torchrun goes on with the hosts that are left, and with those that come."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.scripts import CONFIG, ROOT, environment_with

pytestmark = [
    pytest.mark.slow("starts torchrun and a whole run on changing hosts"),
]

_TIMES = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
_WITH_NEWCOMERS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torchrun 2.14 keeps the address of its first rendezvous, and a new host waits for it in vain."""


def _agent(folder: Path, name: str, port: int) -> subprocess.Popen[bytes]:
    """torchrun of one host."""
    words = [
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"),
        *(
            "--rdzv-conf",
            f"{_TIMES},is_host={int(name == 'first')}",
            "--local-addr",
            "127.0.0.1",
            "--monitor-interval",
            "0.2",
        ),
        *("-m", "worm_dist", "train", str(CONFIG), "--out", str(folder / "run")),
        *("--epochs", "30", "--checkpoint.every", "5ba", "--search.every", "11ba"),
    ]
    with (folder / name).open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=folder,
            env=environment_with(PYTHONPATH=str(ROOT), **_WITH_NEWCOMERS),
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def _kill(agent: subprocess.Popen[bytes]) -> None:
    """As a host dies: torchrun, and its worker, which has a session of its own."""
    if agent.poll() is None:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        for pid in (agent.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    agent.wait()


def _wait(what: Callable[[], bool], agent: subprocess.Popen[bytes], said: Path) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert agent.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)


def _saved(run: Path) -> tuple[int, int]:
    """Number of ranks and step of the newest checkpoint."""
    found = {}
    for path in run.glob("checkpoints/step-*/manifest.json"):
        if ".tmp-" in path.parent.name:
            continue  # it is still being written
        with contextlib.suppress(OSError):  # removed meanwhile, for newer ones
            manifest = json.loads(path.read_text())
            found[manifest["step"]] = manifest["world_size"]
    newest = max(found, default=0)
    return found.get(newest, 0), newest


def test_it_goes_on_with_one_host_less_and_then_with_a_new_one(tmp_path: Path) -> None:
    """With the same global batch, from the newest checkpoint: no step is lost or taken twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, run, said = _agent(tmp_path, "first", port), tmp_path / "run", tmp_path / "first"
    others = [_agent(tmp_path, "second", port)]
    try:
        # The first host may begin alone, if the second is late.
        _wait(lambda: _saved(run)[0] == 2, first, said)
        _kill(others[0])
        _wait(lambda: _saved(run)[0] == 1, first, said)
        others.append(_agent(tmp_path, "third", port))
        _wait(lambda: _saved(run)[0] == 2, first, said)
        assert first.wait(120) == 0, said.read_text()
    finally:
        for agent in (first, *others):
            _kill(agent)
    assert said.read_text().count("* goes on from step") >= 2, said.read_text()
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    epochs = [line["epoch"] for line in lines if line["event"] == "check"]
    assert epochs == sorted(set(epochs)), "a check was made twice"
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "ticket" and result["accuracy"]["final"] > 0.9
    assert result["world_size"] == 2
