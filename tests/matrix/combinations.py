"""The rows of the matrix: everything that people train with, as far as two CPUs can do it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from tests.matrix.combination import Combination, Recipe
from tests.matrix.nets import Detouring, Shared, frozen_convolution, frozen_norm, frozen_shift
from tests.nets import Grouped, Normless, Stacking, gated
from tests.ranks import NO_GROUP

__all__ = ["COMBINATIONS"]


def _of(kind: Any, **settings: Any) -> Any:
    return lambda network: kind(network.parameters(), **settings)


def _without_decay_of_vectors(kind: Any, network: nn.Module, **settings: Any) -> Optimizer:
    """Norms and biases are not decayed and learn at another rate."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 0.02},
    ]
    optimizer: Optimizer = kind(groups, **settings)
    return optimizer


def _gates_apart(network: nn.Module) -> Optimizer:
    """Gates are not decayed.  After a draw there are none, and their group is empty."""
    gates = [p for name, p in network.named_parameters() if name.endswith(".0.scale")]
    others = [p for name, p in network.named_parameters() if not name.endswith(".0.scale")]
    groups: list[dict[str, Any]]
    groups = [{"params": gates, "weight_decay": 0.0, "lr": 0.02}, {"params": others}]
    return AdamW(groups, lr=0.01, weight_decay=0.1)


def _wrapper(**arguments: Any) -> Any:
    return lambda: arguments


def _own_process_group() -> dict[str, Any]:
    return {"process_group": dist.new_group(list(range(dist.get_world_size())))}


def _buffers_off() -> dict[str, Any]:
    # torch 2.14 renamed it, and warns of the old name.
    names = DistributedDataParallel.__init__.__code__.co_varnames
    new = "forward_sync_buffers"
    return {new if new in names else "broadcast_buffers": False}


_ADAMW = _of(AdamW, lr=0.01, weight_decay=0.1)
_FUSED = _of(AdamW, lr=0.01, weight_decay=0.1, fused=True)
_FUSED_SGD = _of(SGD, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True)

_AUTOCAST = Recipe(autocast=True)
_OVERFLOW = Recipe(loss_scale=2.0**8, overflow_at=4)
_CLIP: Any = partial(clip_grad_norm_, max_norm=0.1)
_CLIP_VALUES: Any = partial(clip_grad_value_, clip_value=0.001)

_ALL_BUT_ONE_EACH = (*range(1, 8), *range(9, 14))
_ALL_BUT_OTHERS = (*range(7), *range(8, 13))
_INNER_GROUP = tuple(range(8, 14))
_BY_CHECKS: Mapping[str, Any] = {"hold": (None, None, None, None), "remove": (None,)}
_STATELESS = {"state": "plain SGD has no state"}
_NOTHING = "nothing is frozen"
_NONE_FROZEN = {"held": _NOTHING, "state": _NOTHING}

OPTIMIZERS = (
    Combination(
        "SGD, momentum, decay",
        scheduler=lambda o: OneCycleLR(o, max_lr=0.1, total_steps=40),
    ),
    Combination("SGD, plain", optimizer=_of(SGD, lr=0.05), absent=_STATELESS),
    Combination(
        "SGD, nesterov",
        optimizer=_of(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    Combination("SGD, fused", optimizer=_FUSED_SGD),
    Combination("Adam, L2", optimizer=_of(Adam, lr=0.01, weight_decay=0.01)),
    Combination("Adam, amsgrad", optimizer=_of(Adam, lr=0.01, amsgrad=True)),
    Combination(
        "AdamW",
        optimizer=_ADAMW,
        scheduler=lambda o: CosineAnnealingLR(o, T_max=20),
    ),
    Combination("AdamW, foreach", optimizer=_of(AdamW, lr=0.01, weight_decay=0.1, foreach=True)),
    Combination("AdamW, fused", optimizer=_FUSED),
    Combination(
        "RMSprop, momentum, centered",
        optimizer=_of(RMSprop, lr=0.005, momentum=0.9, weight_decay=0.01, centered=True),
    ),
    Combination("Adagrad", optimizer=_of(Adagrad, lr=0.05, weight_decay=0.01)),
    Combination(
        "groups: SGD",
        optimizer=lambda n: _without_decay_of_vectors(SGD, n, lr=0.05, momentum=0.9),
    ),
    Combination("groups: AdamW", optimizer=lambda n: _without_decay_of_vectors(AdamW, n, lr=0.01)),
)

PRECISION = (
    Combination("bf16 autocast", recipe=_AUTOCAST),
    Combination("bf16 parameters", dtype=torch.bfloat16),
    Combination(
        "fp64",
        dtype=torch.float64,
    ),
    Combination("GradScaler, overflow", recipe=_OVERFLOW),
    Combination("GradScaler, overflow, fused SGD", optimizer=_FUSED_SGD, recipe=_OVERFLOW),
    Combination("GradScaler, overflow, fused AdamW", optimizer=_FUSED, recipe=_OVERFLOW),
    Combination(
        "GradScaler, overflow, probing",
        recipe=Recipe(loss_scale=2.0**8, overflow_at=5, probes_again=1),
        rules=("remove",),
        script={"remove": ((0, 3, 9),)},
    ),
    Combination(
        "GradScaler, overflow, clip",
        recipe=Recipe(loss_scale=2.0**8, overflow_at=4, clip=_CLIP),
    ),
)

STEPS = (
    Combination("no_sync, 3 passes", recipe=Recipe(passes=3)),
    Combination("clip_grad_norm_", recipe=Recipe(clip=_CLIP)),
    Combination("clip_grad_value_", recipe=Recipe(clip=_CLIP_VALUES)),
    Combination("torch.compile inside", compiled=True, rules=("hold",)),
    Combination("channels_last", memory_format=torch.channels_last),
    Combination(
        "channels_last, scope coupled",
        memory_format=torch.channels_last,
        truncation={"scope": "coupled"},
    ),
)

_DETOUR_ON_ONE = Recipe(detours=True, without_detour={1: (1,), 4: (0,), 6: (1,)})
_DETOUR_ON_NONE = Recipe(detours=True, without_detour={1: (0, 1), 4: (0, 1), 6: (0, 1)})
_FINDS_UNUSED = _wrapper(find_unused_parameters=True)

WRAPPERS = (
    Combination("gradient_as_bucket_view", wrapper=_wrapper(gradient_as_bucket_view=True)),
    Combination("static_graph", wrapper=_wrapper(static_graph=True)),
    Combination(
        "find_unused: by one rank",
        network=Detouring,
        wrapper=_FINDS_UNUSED,
        recipe=_DETOUR_ON_ONE,
    ),
    Combination(
        "find_unused: by all ranks",
        network=Detouring,
        wrapper=_FINDS_UNUSED,
        recipe=_DETOUR_ON_NONE,
    ),
    Combination("bucket_cap_mb=0.001", wrapper=_wrapper(bucket_cap_mb=0.001)),
    Combination("bucket_cap_mb=1000", wrapper=_wrapper(bucket_cap_mb=1000)),
    Combination("broadcast_buffers off", wrapper=_buffers_off),
    Combination("a process group of its own", wrapper=_own_process_group),
    Combination("a frozen norm", network=frozen_norm),
    Combination("a frozen shift", network=frozen_shift),
    Combination("a frozen convolution", network=frozen_convolution),
    Combination("a weight in two layers", network=Shared),
)

_SOFT = {"mode": "soft", "ratio": 2.0**-8, "scope": "norm"}  # a power of two is exact anywhere

TRUNCATION = (
    Combination("scope norm", truncation={"scope": "norm"}),
    Combination("scope producer", truncation={"scope": "producer"}),
    Combination("scope coupled", truncation={"scope": "coupled"}),
    Combination("compression bf16", truncation={"compression": "bf16"}),
    Combination("compression fp16", truncation={"compression": "fp16"}),
    Combination("rule free", rules=("free",), truncation={"frozen_weights": "free"}),
    Combination("mode soft", rules=("free",), truncation=_SOFT),
)

MASKS = (
    Combination(
        "a group frozen whole", rules=("hold",), script={"hold": (_INNER_GROUP, (0, 3, 9))}
    ),
    Combination(
        "all but a channel a group",
        script={"hold": (_ALL_BUT_ONE_EACH, _ALL_BUT_OTHERS), "remove": (_ALL_BUT_ONE_EACH,)},
    ),
    Combination(
        "nothing frozen",
        search={"prune_ratio": 0.0},
        script={"hold": ((),), "remove": ((),)},
        absent=_NONE_FROZEN,
    ),
    Combination(
        "prune_ratio 0",
        search={"prune_ratio": 0.0},
        script=_BY_CHECKS,
        absent=_NONE_FROZEN,
    ),
    Combination(
        "prune_ratio .89", search={"prune_ratio": 0.89, "min_keep_ratio": 0.1}, script=_BY_CHECKS
    ),
    Combination("another mask every check", script=_BY_CHECKS),
    Combination(
        "a bucket without life",
        wrapper=_wrapper(bucket_cap_mb=0.0001),
        truncation={"scope": "coupled"},
        rules=("hold",),
        script={"hold": (_INNER_GROUP, (0, 3, 9))},
    ),
    Combination("frozen before the first step", optimizer=_ADAMW, search_steps=0),
)

_ALL_RULES = ("hold", "remove", "free")
_BY_WEIGHTS: Mapping[str, Any] = {"prune_ratio": 0.4, "importance": "weight_norm"}

NETWORKS = (
    Combination("a convolution in groups", network=Grouped, rules=_ALL_RULES),
    Combination(
        "a convolution in groups, AdamW, coupled",
        network=Grouped,
        optimizer=_ADAMW,
        truncation={"scope": "coupled"},
    ),
    Combination("norms of several groups", network=Stacking, rules=_ALL_RULES),
    Combination(
        "norms of several groups, by layer",
        network=Stacking,
        search={"prune_ratio": 0.4, "grouping": "layer"},
        script=_BY_CHECKS,
    ),
    Combination(
        "gates, SGD",
        network=gated,
        rules=_ALL_RULES,
        scheduler=lambda o: OneCycleLR(o, max_lr=0.1, total_steps=40),
    ),
    Combination("gates, AdamW, bf16 autocast", network=gated, optimizer=_ADAMW, recipe=_AUTOCAST),
    Combination(
        "gates in a group of their own",
        network=gated,
        optimizer=_gates_apart,
        scheduler=lambda o: CosineAnnealingLR(o, T_max=20),
        wrapper=_wrapper(gradient_as_bucket_view=True, bucket_cap_mb=0.001),
    ),
    Combination("gates, scope norm", network=gated, truncation={"scope": "norm"}),
    Combination("gates, scope coupled", network=gated, truncation={"scope": "coupled"}),
    Combination("gates, mode soft", network=gated, rules=("free",), truncation=_SOFT),
    Combination("gates, find_unused", network=gated, wrapper=_FINDS_UNUSED, rules=("hold",)),
    Combination("gates, bare module, no group", network=gated, world_size=NO_GROUP, wrapper=None),
    Combination("no norms", network=Normless, search=_BY_WEIGHTS, rules=_ALL_RULES),
    Combination(
        "no norms, AdamW, coupled, 2 passes",
        network=Normless,
        optimizer=_ADAMW,
        search=_BY_WEIGHTS,
        truncation={"scope": "coupled"},
        recipe=Recipe(passes=2),
        memory_format=torch.channels_last,
    ),
    Combination(
        "no norms, mode soft",
        network=Normless,
        search=_BY_WEIGHTS,
        rules=("free",),
        truncation=_SOFT,
    ),
)

WORLDS = (
    Combination("bare module, no group", world_size=NO_GROUP, wrapper=None),
    Combination("1 rank", world_size=1),
    Combination("3 ranks", world_size=3, tolerance=1e-5),
    Combination("4 ranks", world_size=4, tolerance=1e-5, rules=("hold",)),
)

TOGETHER = (
    Combination(
        "much at once",
        optimizer=lambda n: _without_decay_of_vectors(AdamW, n, lr=0.01, fused=True),
        recipe=Recipe(autocast=True, passes=2, loss_scale=2.0**8, overflow_at=4, clip=_CLIP),
        wrapper=_wrapper(gradient_as_bucket_view=True, bucket_cap_mb=0.001),
        truncation={"scope": "coupled", "compression": "bf16"},
        memory_format=torch.channels_last,
    ),
)


def _by_name(rows: Iterable[Combination]) -> dict[str, Combination]:
    named: dict[str, Combination] = {}
    for row in rows:
        assert row.name not in named, row.name
        named[row.name] = row
    return named


COMBINATIONS: Mapping[str, Combination] = _by_name(
    (
        *OPTIMIZERS,
        *PRECISION,
        *STEPS,
        *WRAPPERS,
        *TRUNCATION,
        *MASKS,
        *NETWORKS,
        *WORLDS,
        *TOGETHER,
    )
)
