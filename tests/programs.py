"""Programs: scripts and the command line, as ``python`` would run them, on one rank or on several.

The processes come from the fork server of the ranks, so that they need not import torch again; what
a process of its own would be for, such as warnings at an import, is not seen here.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.idleness import wait
from tests.ranks import PRELOADED

__all__ = ["Ended", "call", "variables_of_ranks"]

_IDLE_LIMIT = 120.0
"""Seconds in which no program of a call computes, after which all are killed."""


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        exitcode: None if it hung and was killed.
        out: its standard output.
        err: its standard error.
    """

    exitcode: int | None
    out: str
    err: str


def variables_of_ranks(world_size: int) -> list[dict[str, str]]:
    """What a launcher puts into the environment of each rank; all of them are on this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(world_size)
    ]


def call(
    words: Sequence[Any],
    folder: Path,
    environments: Sequence[Mapping[str, str]] = ({},),
) -> list[Ended]:
    """Run ``python WORDS`` once for each environment, side by side.

    Args:
        words: ``-m``, a module and its arguments, or a script and its arguments.
        folder: they run in it.
        environments: variables besides those that are there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = [
        context.Process(
            target=_run, args=([str(word) for word in words], folder, number, variables)
        )
        for number, variables in enumerate(environments)
    ]
    for process in started:
        process.start()
    try:
        hung = wait(started, _IDLE_LIMIT)
    finally:  # also if pytest breaks a test off
        for process in started:
            process.kill()
            process.join()
    return [
        Ended(None if number in hung else process.exitcode, *_printed(folder, number))
        for number, process in enumerate(started)
    ]


def _printed(folder: Path, number: int) -> tuple[str, str]:
    return _stream(folder, number, 1).read_text(), _stream(folder, number, 2).read_text()


def _stream(folder: Path, number: int, stream: int) -> Path:
    return folder / f"printed-{number}-{stream}"


def _run(words: list[str], folder: Path, number: int, variables: Mapping[str, str]) -> None:
    for stream in (1, 2):
        with _stream(folder, number, stream).open("w") as file:
            os.dup2(file.fileno(), stream)
    # The fork server has handed its own way on.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(variables)
    os.chdir(folder)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if words[0] == "-m":
        _, module, *sys.argv[1:] = words
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
