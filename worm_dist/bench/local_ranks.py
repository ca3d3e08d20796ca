"""Ranks of a benchmark on this machine, joined over the loopback interface."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

__all__ = ["on_ranks", "one_rank", "process_context"]

Value = TypeVar("Value")


def on_ranks(number: int, function: Callable[..., Value], *arguments: object) -> Value:
    """Call a function on several ranks of one process group over gloo, each with one thread.

    Args:
        number: number of ranks; a single one is this process.
        function: collective; with its arguments and its value it can be pickled.
        arguments: arguments of the function.

    Returns:
        The value on rank zero.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        if number == 1:
            return _on_rank(0, 1, store, function, arguments)
        with ProcessPoolExecutor(number, process_context()) as pool:
            ranks = [
                pool.submit(_on_rank, rank, number, store, function, arguments)
                for rank in range(number)
            ]
            values = [rank.result() for rank in ranks]  # all, for an error on any rank
            return values[0]


def process_context() -> multiprocessing.context.BaseContext:
    """Processes that are copies of one that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    # What is not installed is passed over; the data set of the digits is a part of scikit-learn.
    preload = [f"{__package__}.ledger.training", "sklearn.datasets", "sklearn.model_selection"]
    context.set_forkserver_preload(preload)
    return context


def _on_rank(
    rank: int,
    number: int,
    store: Path,
    function: Callable[..., Value],
    arguments: tuple[object, ...],
) -> Value:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with _group(rank, number, store):
        return function(*arguments)


@contextmanager
def _group(rank: int, number: int, store: Path) -> Iterator[None]:
    if number > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=FileStore(str(store), number), rank=rank, world_size=number
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def one_rank() -> Iterator[None]:
    """Process group with a world size of 1."""
    with tempfile.TemporaryDirectory() as folder, _group(0, 1, Path(folder) / "store"):
        yield
