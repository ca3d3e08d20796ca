"""The rows of the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tests.matrix.nets import frozen_convolution, frozen_norm, frozen_shift
from tests.nets import (
    Concatenating,
    Flattening,
    Normless,
    Plain,
    Residual,
    Separable,
    gated,
)
from tests.oracles import is_gate
from tests.zero.row import Row

__all__ = ["ROWS"]


def _flattening() -> nn.Module:
    """Without dropout, which is another one in a smaller network."""
    network = Flattening()
    network.dropout.p = 0.0
    return network


def _plain() -> nn.Module:
    """Without a bias before a norm, of which only noise is learnt."""
    network = Plain(8, 8)
    network.conv1.bias = None
    return network


def _of(kind: Any, **settings: Any) -> Any:
    return lambda network: kind(network.parameters(), **settings)


def _groups(kind: Any, **settings: Any) -> Any:
    """Vectors are not decayed and learn at another rate."""

    def optimizer(network: nn.Module) -> Optimizer:
        parameters = list(network.parameters())
        made: Optimizer = kind(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
                {"params": [p for p in parameters if p.dim() <= 1], "lr": 0.02},
            ],
            **settings,
        )
        return made

    return optimizer


def _momentum_for_matrices(network: nn.Module) -> Optimizer:
    parameters = list(network.parameters())
    return SGD(
        [
            {"params": [p for p in parameters if p.dim() > 1], "momentum": 0.9},
            {"params": [p for p in parameters if p.dim() <= 1], "momentum": 0.0},
        ],
        lr=0.05,
    )


class Tempered(Residual):
    """A single number is learnt too; in a group of its own it leaves a rank with padding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.temperature


def _temperature_apart(kind: Any, **settings: Any) -> Any:
    def optimizer(network: nn.Module) -> Optimizer:
        others = [p for name, p in network.named_parameters() if name != "temperature"]
        alone = [network.get_parameter("temperature")]
        made: Optimizer = kind([{"params": others}, {"params": alone}], **settings)
        return made

    return optimizer


def _gates_apart(kind: Any, **settings: Any) -> Any:
    """Gates learn at another rate.  After a draw there are none, and their group is empty."""

    def optimizer(network: nn.Module) -> Optimizer:
        gates = [p for name, p in network.named_parameters() if is_gate(name)]
        others = [p for name, p in network.named_parameters() if not is_gate(name)]
        made: Optimizer = kind([{"params": gates, "lr": 0.02}, {"params": others}], **settings)
        return made

    return optimizer


_INNER_GROUP = tuple(range(8, 14))
_HOLD = ("hold",)
_REMOVE = ("remove",)
_ADAMW = _of(AdamW, lr=0.01, weight_decay=0.1)
_CLIP = {"gradient_clipping": 0.05}
_TINY: Mapping[str, Any] = {"reduce_bucket_size": 100}  # some layers are larger
_ONE_BY_ONE: Mapping[str, Any] = {"reduce_scatter": True, "use_multi_rank_bucket_allreduce": False}
_WHOLE: Mapping[str, Any] = {"reduce_scatter": False}
_OVERLAP: Mapping[str, Any] = {"overlap_comm": True}
_BY_WEIGHTS: Mapping[str, Any] = {"importance": "weight_norm"}
_IN_FP32: Mapping[str, Any] = {"data_types": {"buffer_dtype": "bf16", "grad_accum_dtype": "fp32"}}

STAGE_0 = (
    Row("0: SGD", 0, like_ddp=True),
    Row(
        "0: groups, AdamW, 2 passes", 0, optimizer=_groups(AdamW, lr=0.01), passes=2, like_ddp=True
    ),
    Row("0: clipped", 0, rules=_HOLD, settings=_CLIP),
    Row(
        "0: prescaled",
        0,
        rules=_HOLD,
        settings={"prescale_gradients": True, "gradient_predivide_factor": 1},
    ),
    Row("0: sent as bf16", 0, rules=_HOLD, settings={"communication_data_type": "bf16"}),
    Row("0: bf16, SGD, 2 passes, clipped", 0, "bf16", settings=_CLIP, passes=2),
    Row(
        "0: bf16, AdamW, sent as fp32",
        0,
        "bf16",
        rules=_REMOVE,
        optimizer=_ADAMW,
        settings={"communication_data_type": "fp32"},
    ),
    Row("0: bf16, a number, AdamW", 0, "bf16", rules=_REMOVE, network=Tempered, optimizer=_ADAMW),
    Row("0: bf16, a frozen shift", 0, "bf16", rules=_REMOVE, network=frozen_shift),
    Row("0: bf16, overflow", 0, "bf16", rules=_REMOVE, overflow_at=4),
    Row("0: gates", 0, network=gated, like_ddp=True),
    Row(
        "0: bf16, gates apart",
        0,
        "bf16",
        network=gated,
        optimizer=_gates_apart(SGD, lr=0.05, momentum=0.9),
    ),
    Row("0: no norms", 0, network=Normless, search=_BY_WEIGHTS, rules=_REMOVE, like_ddp=True),
    Row("0: 1 rank", 0, rules=_REMOVE, world_size=1, settings=_CLIP),
)

STAGE_1 = (
    Row("1: SGD", 1, like_ddp=True),
    Row("1: whole, AdamW, 2 passes", 1, zero=_WHOLE, optimizer=_ADAMW, passes=2, like_ddp=True),
    Row(
        "1: one by one, tiny buckets",
        1,
        rules=_HOLD,
        zero={**_ONE_BY_ONE, **_TINY},
        like_ddp=True,
    ),
    Row(
        "1: overlap, tiny buckets, a cut scale",
        1,
        network=_plain,  # partitions meet within the second norm's scale
        frozen=((0, 3, 13), (0, 3, 4, 13, 15)),  # behind it too
        rules=_REMOVE,
        zero={**_OVERLAP, **_TINY},
        optimizer=_groups(SGD, lr=0.05, momentum=0.9),
        like_ddp=True,
    ),
    Row(
        "1: sent as bf16, one by one",
        1,
        rules=_HOLD,
        zero=_ONE_BY_ONE,
        settings={"communication_data_type": "bf16"},
    ),
    Row("1: overlap, 2 passes", 1, rules=_HOLD, zero=_OVERLAP, passes=2, like_ddp=True),
    Row(
        "1: a number apart, AdamW",
        1,
        network=Tempered,
        optimizer=_temperature_apart(AdamW, lr=0.01),
        like_ddp=True,
    ),
    Row(
        "1: momentum for matrices",
        1,
        rules=_HOLD,
        optimizer=_momentum_for_matrices,
        like_ddp=True,
    ),
    Row("1: a frozen norm", 1, rules=_HOLD, network=frozen_norm, like_ddp=True),
    Row("1: a frozen shift", 1, rules=_REMOVE, network=frozen_shift, like_ddp=True),
    Row("1: bf16, a frozen shift", 1, "bf16", rules=_REMOVE, network=frozen_shift),
    Row("1: a frozen convolution", 1, rules=_REMOVE, network=frozen_convolution, like_ddp=True),
    Row(
        "1: amsgrad, DeepSpeed's own optimizer",
        1,
        rules=_HOLD,
        optimizer=None,
        settings={
            "optimizer": {
                "type": "Adam",
                "params": {"lr": 0.01, "torch_adam": True, "amsgrad": True, "weight_decay": 0.1},
            }
        },
    ),
    Row(
        "1: bf16, AdamW, clipped, aligned",
        1,
        "bf16",
        zero={"parameter_alignment": True},
        optimizer=_ADAMW,
        settings=_CLIP,
    ),
    Row(
        "1: bf16, round robin, 2 passes",
        1,
        "bf16",
        rules=_REMOVE,
        zero={"round_robin_gradients": True},
        passes=2,
    ),
    Row(
        "1: bf16, overflow",
        1,
        "bf16",
        overflow_at=4,
        settings={"bf16": {"check_grad_overflow": True}},
    ),
    Row(
        "1: gates apart",
        1,
        network=gated,
        optimizer=_gates_apart(SGD, lr=0.05, momentum=0.9),
        like_ddp=True,
    ),
    Row("1: bf16, gates", 1, "bf16", network=gated, rules=_REMOVE),
    Row(
        "1: no norms, tiny buckets",
        1,
        network=Normless,
        search=_BY_WEIGHTS,
        zero=_TINY,
        rules=_REMOVE,
        like_ddp=True,
    ),
    Row("1: 3 ranks", 1, rules=_REMOVE, world_size=3, tolerance=1e-4),
)

STAGE_2 = (
    Row("2: SGD", 2, like_ddp=True),
    Row("2: whole, tiny buckets", 2, rules=_REMOVE, zero={**_WHOLE, **_TINY}, like_ddp=True),
    Row(
        "2: one by one, tiny buckets, AdamW",
        2,
        rules=_HOLD,
        zero={**_ONE_BY_ONE, **_TINY},
        optimizer=_ADAMW,
        like_ddp=True,
    ),
    Row("2: overlap, tiny buckets, 2 passes", 2, zero={**_OVERLAP, **_TINY}, passes=2),
    Row(
        "2: round robin, tiny buckets, groups",
        2,
        zero={"round_robin_gradients": True, **_TINY},
        optimizer=_groups(AdamW, lr=0.01),
        like_ddp=True,
    ),
    Row(
        "2: scope coupled, loss.backward",
        2,
        truncation={"scope": "coupled"},
        style="torch",
        passes=2,
    ),
    Row("2: scope norm", 2, rules=_REMOVE, truncation={"scope": "norm"}, like_ddp=True),
    Row("2: coalesced passes", 2, rules=_HOLD, style="coalesced", passes=2),
    Row("2: unmanaged passes", 2, rules=_REMOVE, style="unmanaged", passes=2),
    Row("2: bf16, AdamW, 2 passes, clipped", 2, "bf16", optimizer=_ADAMW, passes=2, settings=_CLIP),
    Row("2: bf16, accumulated in fp32", 2, "bf16", rules=_HOLD, settings=_IN_FP32, passes=2),
    Row(
        "2: bf16, accumulated in fp32, whole",
        2,
        "bf16",
        rules=_REMOVE,
        zero=_WHOLE,
        settings={**_IN_FP32, "communication_data_type": "fp32"},
        optimizer=_of(AdamW, lr=0.01, weight_decay=0.1, fused=True),
    ),
    Row(
        "2: bf16, accumulated in fp32, one by one",
        2,
        "bf16",
        rules=_HOLD,
        zero={**_ONE_BY_ONE, **_TINY},
        settings=_IN_FP32,
        passes=2,
    ),
    Row("2: flattening", 2, rules=_REMOVE, network=_flattening, like_ddp=True),
    Row("2: depthwise, overlap", 2, rules=_HOLD, network=Separable, zero=_OVERLAP, like_ddp=True),
    Row("2: concatenating", 2, rules=_REMOVE, network=Concatenating, zero=_TINY, like_ddp=True),
    Row("2: gates, tiny buckets", 2, network=gated, zero=_TINY, like_ddp=True),
    Row(
        "2: gates apart, AdamW, overlap",
        2,
        network=gated,
        optimizer=_gates_apart(AdamW, lr=0.01),
        zero=_OVERLAP,
        rules=_HOLD,
        like_ddp=True,
    ),
    Row(
        "2: no norms, coupled",
        2,
        network=Normless,
        search=_BY_WEIGHTS,
        truncation={"scope": "coupled"},
        like_ddp=True,
    ),
    Row(
        "2: bf16, no norms, AdamW",
        2,
        "bf16",
        network=Normless,
        search=_BY_WEIGHTS,
        optimizer=_ADAMW,
        rules=_REMOVE,
    ),
    Row("2: 1 rank", 2, rules=_HOLD, world_size=1, settings=_CLIP),
    Row(
        "2: 4 ranks, a partition without life",
        2,
        rules=_HOLD,
        zero=_TINY,
        truncation={"scope": "coupled"},
        frozen=(_INNER_GROUP, (0, 3, 9)),
        world_size=4,
        tolerance=1e-4,
    ),
)

_LATE: Mapping[str, Any] = {"stage3_param_persistence_threshold": 0}  # gathered layer by layer
_SENT_FP32: Mapping[str, Any] = {"communication_data_type": "fp32"}
_COUPLED: Mapping[str, Any] = {"scope": "coupled"}

STAGE_3 = (
    Row("3: SGD", 3, like_ddp=True),
    Row("3: groups, AdamW, 2 passes", 3, optimizer=_groups(AdamW, lr=0.01), passes=2),
    Row("3: clipped", 3, rules=_HOLD, settings=_CLIP),
    Row("3: gathered late, AdamW", 3, zero=_LATE, optimizer=_ADAMW, like_ddp=True),
    Row(
        "3: gathered late, sub-groups, tiny buckets",
        3,
        rules=_REMOVE,
        zero={**_LATE, **_TINY, "sub_group_size": 200},
        like_ddp=True,
    ),
    Row("3: not contiguous", 3, rules=_REMOVE, zero={"contiguous_gradients": False}),
    Row("3: bf16, AdamW, 2 passes, clipped", 3, "bf16", optimizer=_ADAMW, passes=2, settings=_CLIP),
    Row("3: bf16, accumulated in fp32", 3, "bf16", rules=_HOLD, settings=_IN_FP32, passes=2),
    Row("3: bf16, sent as fp32", 3, "bf16", rules=_REMOVE, settings=_SENT_FP32),
    Row("3: bf16, gathered late, a frozen shift", 3, "bf16", zero=_LATE, network=frozen_shift),
    Row("3: bf16, overflow", 3, "bf16", rules=_REMOVE, overflow_at=4),
    Row("3: scope coupled, loss.backward", 3, truncation=_COUPLED, style="torch", passes=2),
    Row(
        "3: a number apart, AdamW",
        3,
        network=Tempered,
        optimizer=_temperature_apart(AdamW, lr=0.01),
        like_ddp=True,
    ),
    Row(
        "3: gates apart",  # DeepSpeed has a linear layer of its own here, which DDP has not
        3,
        network=gated,
        optimizer=_gates_apart(SGD, lr=0.05, momentum=0.9),
    ),
    Row("3: no norms", 3, network=Normless, search=_BY_WEIGHTS, rules=_REMOVE, like_ddp=True),
    Row("3: 3 ranks", 3, rules=_REMOVE, world_size=3, tolerance=1e-4),
    Row("3: 1 rank", 3, rules=_REMOVE, world_size=1),
)


def _by_name(rows: Iterable[Row]) -> dict[str, Row]:
    named: dict[str, Row] = {}
    for row in rows:
        assert row.name not in named, row.name
        named[row.name] = row
    return named


ROWS: Mapping[str, Row] = _by_name((*STAGE_0, *STAGE_1, *STAGE_2, *STAGE_3))
