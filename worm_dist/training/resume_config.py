"""Settled: the settings that a run cannot change once it has begun."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .deepspeed_config import deepspeed_settings
from .run_config import RunConfig

__all__ = ["changes", "digest_of", "settled"]

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
"""Besides those of ``checkpoint``: how long to train, what to wait for, where things are, and the
draw that is still to come."""


def settled(config: RunConfig) -> dict[str, Any]:
    """By their dotted keys.  Of the backend it only matters who trains: torch or DeepSpeed; and of
    DeepSpeed's file not where it is, but what it says.

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
        fixed["distributed.backend"] = "auto"
        return fixed
    said = deepspeed_settings(config, world_size=1)
    del said["train_micro_batch_size_per_gpu"]  # the batch is shared out anew
    return {**fixed, **{f"distributed.deepspeed.{key}": value for key, value in said.items()}}


def digest_of(fixed: Mapping[str, Any]) -> str:
    """Of ``settled``, for a manifest."""
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``optimizer.lr: 0.1 -> 0.2`` for every setting that is another one."""
    return [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
