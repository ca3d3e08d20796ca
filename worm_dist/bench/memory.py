"""Benchmark of memory: what attach, check, save and draw take where the training is sharded."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from ..checkpoint.async_save import AsyncSaver
from ..checkpoint.durable_io import write_json
from ..config import TruncationConfig, WormConfig
from ..engine.attach import attach
from ..engine.engine import Engine
from ..models import build_model
from ..training.fully_sharded import shard
from ..training.parallelize import backward, deepspeed_module, step
from .ledger.table import header
from .network import several_ranks
from .variants import HALF, Batch, uniform_mask

__all__ = ["MemoryRow", "measure", "peak_bytes", "run"]

_SHARDINGS = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
_UNIT_MB = 4.0
"""Modules of this size are sharded by themselves under FSDP2."""
_BUCKET_ELEMENTS = 1 << 20
"""Elements of DeepSpeed's buckets; its default of 5e8 would be larger than all that is measured."""


@dataclass(frozen=True)
class MemoryRow:
    """Memory of one operation.

    Attributes:
        sharding: what is sharded, and by whom.
        ranks: number of ranks.
        operation: ``attach``, ``check``, ``draw``, or ``save`` of the engine's and the optimizer's
            state, by all ranks or by rank zero, without what is written to disk.
        rank_zero: most bytes in tensors at a time, beyond those from before, for each parameter of
            the dense network; on rank zero.
        others: the same on the rank of all others that needs most.
        largest: the largest single tensor on these, in bytes for each parameter.
    """

    sharding: str
    ranks: int
    operation: str
    rank_zero: float
    others: float
    largest: float


def run(model: str, folder: Path) -> None:
    """Measure; rank zero prints the rows and writes them.  Every rank calls it.

    Args:
        model: name of the model, for 32x32 images.
        folder: folder of ``memory-<ranks>.json``.

    Raises:
        BackendError: there is a single rank, or DeepSpeed is not installed.
        ConfigError: the model does not exist.
    """
    with several_ranks() as rank:
        rows = [row for kind in _SHARDINGS for row in measure(model, kind)]
        if rank == 0:
            parameters = sum(p.numel() for p in build_model(model, 10, 3).parameters())
            print(f"{model}, {parameters:,} parameters, AdamW, fp32\n")
            print("\n".join(_table(rows)))
            path = folder / f"memory-{dist.get_world_size()}.json"
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"model": model, "rows": [asdict(row) for row in rows]})
            print(f"files: {path}")


def peak_bytes(operation: Callable[[], object]) -> tuple[int, int]:
    """Run an operation, and count the CPU memory of tensors that its thread allocates.

    Returns:
        The most bytes at a time, beyond those from before; and the size of the largest allocation.
    """
    gc.collect()  # what is freed meanwhile would be subtracted
    with _unreported(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        operation()
    results = profiler.profiler.kineto_results
    changes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    return max(0, 0, *itertools.accumulate(changes)), max(0, 0, *changes)


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Discard what the profiler's library writes to the standard error."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def measure(model: str, sharding: str) -> Iterator[MemoryRow]:
    """Measure the operations on a network in training.  Collective.

    Args:
        model: name of the model, for 32x32 images.
        sharding: ``ZeRO-1``, ``ZeRO-2``, ``ZeRO-3`` or ``FSDP2``.
    """
    torch.manual_seed(0)
    network = build_model(model, 10, 3)
    num_parameters = sum(p.numel() for p in network.parameters())
    generator = torch.Generator().manual_seed(dist.get_rank())
    batch = torch.randn(2, 3, 32, 32, generator=generator), torch.arange(2)
    first, optimizer = _sharded(network, sharding, batch)
    config = WormConfig(truncation=TruncationConfig(frozen_weights="hold"))
    attached = []

    def attached_engine() -> None:
        inputs = batch[0][:1]
        attached.append(attach(first, optimizer, config, example_inputs=inputs, steps_per_epoch=1))

    yield _row(sharding, "attach", attached_engine, num_parameters)
    (engine,) = attached
    for _ in range(2):
        _step(engine, batch)
    yield _row(sharding, "check", engine.check, num_parameters)

    def save(sharded: bool) -> None:
        saver = AsyncSaver()
        engine.state_dict()
        state = engine.optimizer_state(sharded=sharded)
        if state is not None:
            saver.save({"run": state}, lambda copies: None)
            saver.finish()

    yield _row(sharding, "save, by all ranks", lambda: save(True), num_parameters)
    yield _row(sharding, "save, by rank 0", lambda: save(False), num_parameters)
    mask = uniform_mask(engine.groups, HALF)
    yield _row(sharding, "draw", lambda: engine.draw(mask), num_parameters)
    _step(engine, batch)


def _sharded(network: nn.Module, sharding: str, batch: Batch) -> tuple[nn.Module, Optimizer | None]:
    """The network as it trains, and its optimizer; None if the network has it."""
    if sharding == "FSDP2":
        model = shard(network, _UNIT_MB, dist.get_world_size(), torch.device("cpu"))
        return model, AdamW(model.parameters(), lr=1e-4)
    settings = {
        "train_micro_batch_size_per_gpu": len(batch[0]),
        "zero_optimization": {
            "stage": int(sharding[-1]),
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed_module(batch[0].device).initialize(
        model=network,
        optimizer=AdamW(network.parameters(), lr=1e-4),
        config=settings,
        dist_init_required=False,
    )
    return engine, None


def _step(engine: Engine, batch: Batch) -> None:
    images, labels = batch
    backward(engine, nn.functional.cross_entropy(engine.model(images), labels))
    step(engine)


def _row(
    sharding: str, name: str, operation: Callable[[], object], num_parameters: int
) -> MemoryRow:
    found = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64)
    found[dist.get_rank()] = torch.tensor(peak_bytes(operation))
    dist.all_reduce(found)
    (zero, _), (others, largest) = found[0].tolist(), found[1:].amax(dim=0).tolist()
    return MemoryRow(
        sharding,
        dist.get_world_size(),
        name,
        *(round(number / num_parameters, 3) for number in (zero, others, largest)),
    )


def _table(rows: list[MemoryRow]) -> list[str]:
    titles = ["sharding", "ranks", "operation", "rank 0", "other ranks", "largest tensor there"]
    return [
        *header(titles),
        *(
            f"| {row.sharding} | {row.ranks} | {row.operation} | {row.rank_zero:.2f} | "
            f"{row.others:.2f} | {row.largest:.2f} |"
            for row in rows
        ),
    ]
