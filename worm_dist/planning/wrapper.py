"""Wrapper: what a network is wrapped in, and the settings that decide what a step then sends."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ..errors import ConfigError

__all__ = ["WrapperKind", "WrapperSettings", "ZeroSettings"]

WrapperKind = Literal["ddp", "fsdp", "deepspeed"]

_FILE = "distributed.deepspeed"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of DeepSpeed's file that decide how many bytes a step sends, and when; the defaults
    are DeepSpeed's, but for the stage.  Sizes are in elements.

    Attributes:
        stage: the stage of ZeRO.
        weights, gradients: the dtypes in which they are sent.
        num_passes: forward and backward passes in a step.
        overlaps: ``overlap_comm``; None for DeepSpeed's choice, which depends on the stage.
        round_robin: ``round_robin_gradients``.
        is_aligned: ``parameter_alignment``.
        bucket: ``reduce_bucket_size``.
        most_prefetched, most_live, reuse_distance: ``stage3_prefetch_bucket_size``,
            ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``.
        persistent, most_persistent: ``stage3_param_persistence_threshold`` and
            ``stage3_model_persistence_threshold``.
    """

    stage: int = 1
    weights: torch.dtype = torch.float32
    gradients: torch.dtype = torch.float32
    num_passes: int = 1
    overlaps: bool | None = None
    round_robin: bool = False
    is_aligned: bool = False
    bucket: int = 500_000_000
    most_prefetched: int = 50_000_000
    most_live: int = 1_000_000_000
    reuse_distance: int = 1_000_000_000
    persistent: int = 100_000
    most_persistent: int = sys.maxsize

    @property
    def reduces_early(self) -> bool:
        """Whether gradients are reduced while the backward pass goes on."""
        return self.stage == 3 if self.overlaps is None else self.overlaps

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ZeroSettings:
        """Those in a configuration for ``deepspeed.initialize``.

        Raises:
            ConfigError: a value that is read here is none that DeepSpeed would accept, or fp16 is
                enabled.
        """
        zero = settings.get("zero_optimization", {})
        if not isinstance(zero, Mapping):
            raise ConfigError(f"{_FILE}: zero_optimization: {zero!r} is not an object of settings")
        stage = zero.get("stage", 0)
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f"{_FILE}: zero_optimization.stage: {stage!r} is not 0, 1, 2 or 3")
        fp16 = settings.get("fp16")
        if isinstance(fp16, Mapping) and fp16.get("enabled", False):
            raise ConfigError(f"{_FILE}: fp16 is not supported; choose bf16 or fp32")
        is_bf16 = bool(settings.get("bf16", {}).get("enabled", False))
        weights = torch.bfloat16 if is_bf16 else torch.float32
        sent = settings.get("communication_data_type")
        sizes = {
            "bucket": "reduce_bucket_size",
            "most_prefetched": "stage3_prefetch_bucket_size",
            "most_live": "stage3_max_live_parameters",
            "reuse_distance": "stage3_max_reuse_distance",
            "persistent": "stage3_param_persistence_threshold",
            "most_persistent": "stage3_model_persistence_threshold",
        }
        return cls(
            stage=int(stage),
            weights=weights,
            gradients=_DTYPES.get(str(sent), weights),
            num_passes=int(settings.get("gradient_accumulation_steps", 1)),
            overlaps=zero.get("overlap_comm"),
            round_robin=bool(zero.get("round_robin_gradients", False)),
            is_aligned=bool(zero.get("parameter_alignment", False)),
            **{name: _size(key, zero[key]) for name, key in sizes.items() if key in zero},
        )


def _size(key: str, value: Any) -> int:
    try:
        return int(float(value))  # such as 5e8
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{_FILE}: zero_optimization.{key}: {value!r} is not a number of elements"
        ) from error


@dataclass(frozen=True)
class WrapperSettings:
    """What a network is wrapped in.

    Attributes:
        kind: DistributedDataParallel, torch's ``fully_shard``, or DeepSpeed's engine.
        unit_mb: size in MiB from which on ``fully_shard`` shards modules by themselves.
        zero: DeepSpeed's settings.
    """

    kind: WrapperKind = "ddp"
    unit_mb: float = 25.0
    zero: ZeroSettings = field(default_factory=ZeroSettings)

    @property
    def name(self) -> str:
        """One of ``WRAPPERS``."""
        return f"zero-{self.zero.stage}" if self.kind == "deepspeed" else self.kind

    def named(self, name: str) -> WrapperSettings:
        """These settings with another wrapper, by its ``name``."""
        if name == "ddp":
            return replace(self, kind="ddp")
        if name == "fsdp":
            return replace(self, kind="fsdp")
        stage = int(name.removeprefix("zero-"))
        return replace(self, kind="deepspeed", zero=replace(self.zero, stage=stage))

    @property
    def gathers_for_passes(self) -> bool:
        """Whether weights are gathered for every pass."""
        return self.kind == "fsdp" or (self.kind == "deepspeed" and self.zero.stage == 3)

    @property
    def title(self) -> str:
        """What the network is wrapped in, for a reader."""
        if self.kind == "deepspeed":
            return f"DeepSpeed's ZeRO, stage {self.zero.stage}"
        return {"ddp": "DistributedDataParallel", "fsdp": "fully_shard"}[self.kind]
