"""Ranks: run a function in several real processes that train together.

The processes come from a fork server that has imported torch beforehand, so that each costs about a
tenth of a second.  They meet in a file, not at a port, and talk through gloo.  Ranks that hang are
stopped: their stacks are shown in the report.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from tests.idleness import wait

__all__ = ["NO_GROUP", "PRELOADED", "Outcome", "RankFailure", "Ranks"]

NO_GROUP = 0
"""World size of one process without a process group."""

PRELOADED = ["tests.preloaded"]
"""A process has one fork server, for all kinds of ranks."""


class RankFailure(AssertionError):
    """A rank raised, died or hung."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        rank: its number.
        exitcode: of its process: 0 if the function returned, 1 if it raised, negative if a signal
            ended it.
        value: what the function returned.
        error: name of the exception's type, "" if there was none.
        text: what the exception says.
        traceback: of the exception, or the stacks of a rank that hung.
        hung: the process was still there when no rank had computed for long, and was stopped.
        seconds: from the call of the function to its end.
    """

    rank: int
    exitcode: int | None = None
    value: Any = None
    error: str = ""
    text: str = ""
    traceback: str = ""
    hung: bool = False
    seconds: float = float("nan")

    def __str__(self) -> str:
        how = "hung" if self.hung else f"exit code {self.exitcode} {self.error}"
        return f"--- rank {self.rank}: {how}\n{self.traceback}"


class Ranks:
    """Calls functions of a test module in several processes at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_calls = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a top-level function returns on every rank, by rank.

        Raises:
            RankFailure: a rank did not return.
        """
        outcomes = self.outcomes(world_size, function, *args)
        if any(outcome.exitcode != 0 for outcome in outcomes):
            raise RankFailure("\n".join(map(str, outcomes)))
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        group_timeout: float = 60.0,
        idle_limit: float | None = None,
    ) -> list[Outcome]:
        """How every rank ended, whatever happened.

        Args:
            world_size: number of processes; ``NO_GROUP`` for one without a process group.
            function: of the top level of a module; it is called with ``args``.
            group_timeout: seconds after which a collective gives up.
            idle_limit: seconds in which no rank computes, after which all are stopped; 30 more than
                ``group_timeout`` if None.
        """
        self._num_calls += 1
        folder = self._folder / f"ranks-{self._num_calls}"
        folder.mkdir()
        call = pickle.dumps((function, args))
        processes = [
            self._context.Process(
                target=_run, args=(rank, world_size, str(folder), group_timeout, call)
            )
            for rank in range(max(world_size, 1))
        ]
        for process in processes:
            process.start()
        hung = _join(processes, group_timeout + 30 if idle_limit is None else idle_limit)
        return [
            _outcome(folder, rank, process.exitcode, rank in hung)
            for rank, process in enumerate(processes)
        ]


def _join(processes: list[Any], idle_limit: float) -> set[int]:
    """Wait for all; the numbers of those that had to be stopped."""
    hung = {rank for rank, process in enumerate(processes)}
    try:
        hung = wait(processes, idle_limit)
    finally:  # also if pytest breaks a test off, in which ranks compute for ever
        running = [processes[rank] for rank in hung if processes[rank].is_alive()]
        for process in running:
            os.kill(process.pid, signal.SIGUSR1)  # writes the stacks
        if running:
            time.sleep(0.5)
        for process in running:
            process.kill()
        for process in processes:
            process.join()
    return hung


def _outcome(folder: Path, rank: int, exitcode: int | None, hung: bool) -> Outcome:
    written = folder / f"{rank}.pickle"
    fields = pickle.loads(written.read_bytes()) if written.exists() else {}
    stacks = (folder / f"{rank}.stacks").read_text() if (folder / f"{rank}.stacks").exists() else ""
    return Outcome(rank, exitcode=exitcode, hung=hung, **{"traceback": stacks, **fields})


def _run(rank: int, world_size: int, folder: str, group_timeout: float, call: bytes) -> None:
    place = Path(folder)
    stacks = (place / f"{rank}.stacks").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function, args = pickle.loads(call)
    if world_size != NO_GROUP:
        dist.init_process_group(
            "gloo",
            store=FileStore(str(place / "rendezvous"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=group_timeout),
        )
        # A rank whose function is short ended, connections and all, while another one was
        # still connecting: "Connection closed by peer" on a busy machine.
        dist.barrier()
    start = time.monotonic()
    fields: dict[str, Any] = {}
    try:
        fields["value"] = function(*args)
    except Exception as error:
        fields["error"] = type(error).__name__
        fields["text"] = str(error)
        fields["traceback"] = traceback.format_exc()
    fields["seconds"] = time.monotonic() - start
    # Whole or not at all: a rank may be stopped at any moment.
    staged = place / f"{rank}.staged"
    staged.write_bytes(pickle.dumps(fields))
    staged.replace(place / f"{rank}.pickle")
    if world_size != NO_GROUP:
        dist.destroy_process_group()
    sys.exit(1 if "error" in fields else 0)
