"""Row: one way to shard and train a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tests.nets import Grouped, Normless, Residual, gated
from tests.resuming import transformer

__all__ = ["COLUMNS", "ROWS", "Row"]

COLUMNS = ("exact", "held", "agree", "bytes", "draw", "ddp")


def _sgd(network: nn.Module) -> Optimizer:
    return SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def _adamw(network: nn.Module) -> Optimizer:
    """Vectors are not decayed and learn at another rate."""
    parameters = list(network.parameters())
    return AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() <= 1], "lr": 0.02},
        ],
        lr=0.01,
    )


@dataclass(frozen=True)
class Row:
    """Attributes:
    units: modules that are sharded by themselves, before the network is.
    mesh: number of ranks in each dimension of the mesh.
    passes: forward and backward passes of a step; all but the last do not synchronise.
    partial: whether all passes reduce-scatter; then all but the last do not average over replicas.
    clip: largest norm of the gradients; 0 for any.
    rules: what becomes of frozen weights, one training for each.
    ddp: how far weights may be from those under DistributedDataParallel; None if they are not
        compared.
    exact: how far weights may be from those of a dense reduction.
    compiled: what runs compiled: the units, the network in place, or torch.compile's wrapper around
        it; compared with the same uncompiled.
    surplus: whether nothing is padded, so that rows are sent in equal chunks.
    """

    units: tuple[str, ...] = ("conv1", "bn1", "head")
    mesh: tuple[int, ...] = (2,)
    network: Callable[[], nn.Module] = Residual
    optimizer: Callable[[nn.Module], Optimizer] = _sgd
    reshard: bool | None = None
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    passes: int = 1
    partial: bool = False
    clip: float = 0.0
    rules: tuple[str, ...] = ("hold", "remove")
    search: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "producer"
    ddp: float | None = 0.0
    exact: float = 0.0
    surplus: bool = False
    checkpointed: tuple[str, ...] = ()
    compiled: str = ""

    @property
    def world_size(self) -> int:
        return torch.Size(self.mesh).numel()


_BF16: Mapping[str, Any] = {
    "param_dtype": torch.bfloat16,
    "ddp": None,
    "network": transformer,  # torch's BatchNorm on CPUs takes no bf16 weights
    "units": ("encoder.layers.encoder_layer_0", "heads"),
}

ROWS: Mapping[str, Row] = {
    "SGD": Row(),
    "one unit, AdamW": Row(units=(), optimizer=_adamw),
    "resharded, surplus": Row(reshard=True, surplus=True, rules=("remove",)),
    "not resharded, 2 passes": Row(reshard=False, passes=2, rules=("remove",)),
    "clipped": Row(clip=0.05, ddp=1e-6, rules=("remove",)),
    "bf16 weights, fp32 sums": Row(**_BF16, reduce_dtype=torch.float32, rules=("hold",)),
    "bf16, AdamW, 2 passes, surplus": Row(
        **_BF16, optimizer=_adamw, passes=2, surplus=True, rules=("remove",)
    ),
    "fp32 weights, bf16 sums": Row(reduce_dtype=torch.bfloat16, ddp=None, rules=("hold",)),
    "gates, scope coupled": Row(
        units=("encoder", "stem"), network=gated, scope="coupled", optimizer=_adamw, ddp=1e-5
    ),
    "weight norm, transposed": Row(
        units=("up", "hidden"),
        network=Normless,
        search={"importance": "weight_norm"},
        rules=("remove",),
    ),
    "groups, checkpointed": Row(
        units=("conv2", "bn2"), network=Grouped, checkpointed=("conv2", "bn2"), rules=("remove",)
    ),
    "compiled units": Row(
        units=("encoder.layers.encoder_layer_0",),
        network=transformer,
        optimizer=_adamw,
        rules=("remove",),
        compiled="units",
        ddp=None,
    ),
    "compiled network": Row(units=(), compiled="network", rules=("remove",), ddp=None),
    "compiled around": Row(
        units=("conv1",), compiled="around", rules=("remove",), passes=2, ddp=None
    ),
    "3 ranks": Row(mesh=(3,), ddp=1e-5, exact=1e-5, rules=("remove",)),
    "replicas": Row(mesh=(2, 2), ddp=1e-5, surplus=True),
    "replicas, 2 partial bf16 sums": Row(
        mesh=(2, 2),
        reduce_dtype=torch.bfloat16,
        passes=2,
        partial=True,
        ddp=None,
        rules=("remove",),
    ),
}
