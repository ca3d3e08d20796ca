"""Settings that must not change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .deepspeed_config import deepspeed_settings
from .run_config import RunConfig

__all__ = ["changes", "fixed_settings"]

_MAY_CHANGE = (
    "name",
    "epochs",
    "data.root",
    "data.num_workers",
    "distributed.startup_timeout_seconds",
    "distributed.timeout_seconds",
    "divergence.check_every",
    "ticket.recalibrate_batches",
    "ticket.recalibrate_memory_mb",
)
"""Keys, besides those of ``checkpoint``, that a resumed run may change: the length of the training,
timeouts, paths, and the recalibration at a draw that is still to come."""


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that must not change, by dotted key.

    For the backend only the choice between DistributedDataParallel, ``fully_shard`` and DeepSpeed
    counts; for DeepSpeed's file its content counts, not its path.

    Raises:
        ConfigError: DeepSpeed's file cannot be read.
    """
    fixed = {
        key: value
        for key, value in config.flat().items()
        if key not in _MAY_CHANGE and not key.startswith("checkpoint.")
    }
    del fixed["distributed.deepspeed"]
    if config.distributed.backend != "deepspeed":
        is_sharded = config.distributed.backend == "fsdp"
        fixed["distributed.backend"] = "fsdp" if is_sharded else "auto"
        return fixed
    deepspeed = deepspeed_settings(config, world_size=1)
    del deepspeed["train_micro_batch_size_per_gpu"]  # it depends on the world size
    return {**fixed, **{f"distributed.deepspeed.{key}": value for key, value in deepspeed.items()}}


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe every setting that differs, such as ``optimizer.lr: 0.1 -> 0.2``."""
    return [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
