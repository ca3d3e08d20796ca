"""Row: one way to train under DeepSpeed; and the columns, what has to hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from tests.nets import Residual
from tests.zero.building import settings_of

__all__ = ["COLUMNS", "Row"]

COLUMNS: Mapping[str, str] = {
    "exact": "weights, master weights, moments and statistics are those of plain DeepSpeed whose "
    "frozen gradients are zeroed before they are reduced",
    "held": "frozen slices stay bit for bit, masters too; faded ones are start × (N−a)/N, then 0",
    "agree": "all ranks hold the same bits after every step",
    "bytes": "what is handed to torch.distributed is the live elements and what lives of this "
    "rank's partition, to the element, with its padding, and is what the engine says",
    "draw": "the drawn network computes what the masked one did, masters, moments and counters are "
    "carried over, and it trains on as the masked one would",
    "ddp": "the same weights, bit for bit, as under DistributedDataParallel",
}


def _sgd(network: nn.Module) -> Optimizer:
    return SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: short.
        stage: of ZeRO.
        precision: of weights and inputs.
        zero, settings: DeepSpeed's settings, in ``zero_optimization`` and beside it.
        network: makes the network.
        optimizer: of a network's parameters; None for the one that ``settings`` name.
        passes: forward and backward passes a step.
        style: how the passes are made; see ``Trainee.step``.
        search, truncation: the engine's settings; ``rule`` is not among them.
        rules: each is one run, from the search to the ticket; one of them where the row is about
            how gradients get there.
        frozen: channels to freeze, counted over all groups, one generation after the other, where
            it matters which.
        overflow_at: the step in which the last rank's loss is infinite.
        world_size: number of ranks.
        tolerance: relative; 0 where the sums are exact.
        like_ddp: DDP sums in the same order, so the weights are the same.
    """

    name: str
    stage: int
    precision: Literal["fp32", "bf16"] = "fp32"
    zero: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: Callable[[], nn.Module] = Residual
    optimizer: Callable[[nn.Module], Optimizer] | None = _sgd
    passes: int = 1
    style: Literal["engine", "torch", "coalesced", "unmanaged"] = "engine"
    search: Mapping[str, Any] = field(default_factory=dict)
    truncation: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[str, ...] = ("hold", "remove")
    frozen: tuple[tuple[int, ...], ...] = ()
    overflow_at: int | None = None
    world_size: int = 2
    tolerance: float = 0.0
    like_ddp: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def all_settings(self) -> dict[str, Any]:
        """For ``deepspeed.initialize``."""
        settings = dict(self.settings)
        if self.precision == "bf16":
            types = settings.get("data_types", {})
            settings["bf16"] = {"enabled": True, **settings.get("bf16", {})}
            # BatchNorm on a CPU wants its statistics in the weights' precision.
            settings["data_types"] = {"buffer_dtype": "bf16", **types}
        if self.style == "unmanaged":
            settings["managed_gradient_accumulation"] = False
        elif self.style != "coalesced":
            settings["gradient_accumulation_steps"] = self.passes
        return settings_of(self.stage, zero_optimization=dict(self.zero), **settings)

    @property
    def persists(self) -> bool:
        """Whether in stage 3 the weights, which are all small, stay gathered after a step."""
        threshold = self.zero.get("stage3_param_persistence_threshold", 10**5)
        return self.stage == 3 and self.world_size > 1 and bool(threshold)

    @property
    def num_reductions(self) -> int:
        """How often a step's gradients are reduced: stages 2 and 3 do it in every pass."""
        return self.passes if self.stage >= 2 and self.style != "coalesced" else 1

    @property
    def sent_dtype(self) -> torch.dtype:
        """Of gradients on their way."""
        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names[self.settings.get("communication_data_type", self.precision)]

    def remark(self, column: str) -> str | None:
        """What has to be said of a cell besides whether it holds."""
        if column == "exact" and self.tolerance:
            return f"to a relative {self.tolerance:.0e}: a longer ring adds in another order"
        return self.why_not(column)

    def why_not(self, column: str) -> str | None:
        """Why a column has no meaning here; None if it has."""
        if column == "ddp" and not self.like_ddp:
            return "DDP would add in another order, precision or scale"
        if column == "agree" and self.world_size == 1:
            return "one process has nobody to agree with"
        if column == "bytes" and self.stage == 3 and "reduce_bucket_size" in self.zero:
            return "how much is padded depends on what is ready at the same time"
        return None
