"""Run state: the schema of a run's saved state, and its validation against the network.

A state is checked as a whole, on every rank alike, before anything of it is used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from ..backends.optimizer_state import OptimizerStateSchema
from ..checkpoint.sharded_tensor import SavedTensor, StoredTensor
from ..engine.state import EngineSchema
from ..errors import CheckpointError
from ..groups.finite_values import finite_names
from ..groups.full_shape import full_shape
from ..schema import Count, Finite, Schema, first_problem, schema_of
from .rank_state import Position, PositionSchema, RankStateSchema
from .reporting.phase_stats import PhaseStatsSchema
from .reporting.reporter import ReportSchema
from .reporting.result import Result

__all__ = [
    "FORMAT",
    "require_network",
    "require_options",
    "require_position",
    "require_valid",
    "schedule_state",
]

FORMAT = 4


class _ScheduleSchema(Schema):
    """What a learning rate schedule goes on from; all else follows from the settings."""

    model_config = ConfigDict(extra="ignore")

    last_epoch: Count
    step_count: Count = Field(alias="_step_count")
    base_lrs: list[Finite]
    last_lr: list[Finite] = Field(alias="_last_lr")


class _RunSchema(Schema):
    format: Count
    position: PositionSchema
    engine: EngineSchema
    network: dict[str, SavedTensor]
    optimizer: OptimizerStateSchema
    schedule: _ScheduleSchema
    rewound: dict[str, Tensor] | None
    ranks: list[RankStateSchema]
    result: schema_of(Result)  # type: ignore[valid-type]
    phase_stats: PhaseStatsSchema
    report: ReportSchema


def require_valid(state: Any, path: Path) -> None:
    """Check keys, types and values of the state in a checkpoint.

    Args:
        state: what was read.
        path: the checkpoint's folder, for messages.

    Raises:
        CheckpointError: naming the key.
    """
    found = state.get("format") if isinstance(state, Mapping) else None
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(
            f"--resume: expected state format {FORMAT}, found {_shown(found)}; another version "
            f"of worm_dist wrote {path}"
        )
    try:
        valid = _RunSchema.model_validate(dict(state))
    except ValidationError as error:
        raise _not_whole(path, first_problem(error)) from error
    for number, rank in enumerate(valid.ranks):
        if (rank.engine.number, rank.engine.world_size) != (number, len(valid.ranks)):
            raise _not_whole(
                path,
                f"ranks.{number}.engine: of rank {rank.engine.number} of {rank.engine.world_size}, "
                f"but there are {len(valid.ranks)} ranks",
            )
    if not valid.ranks:
        raise _not_whole(path, "ranks: empty")
    for problem in _odd_moments(valid.optimizer):
        raise _not_whole(path, f"optimizer.parameters.{problem}")


def _odd_moments(state: OptimizerStateSchema) -> Iterator[str]:
    """Parameters whose moments differ in key or kind from those of most; a missing one would begin
    anew without a word."""
    found = {
        name: {
            key: f"{value.dtype} tensor"
            if isinstance(value, (Tensor, StoredTensor))
            else type(value).__name__
            for key, value in {**parameter.moments, **parameter.per_param}.items()
        }
        for name, parameter in state.parameters.items()
    }
    counts = Counter(tuple(sorted(kinds.items())) for kinds in found.values())
    ((most, _),) = counts.most_common(1) or [((), 0)]
    usual = dict(most)
    for name, kinds in found.items():
        for key in kinds.keys() | usual.keys():
            if kinds.get(key) != usual.get(key):
                yield (
                    f"{name[:100]}.{key}: {kinds.get(key, 'missing')}, but most parameters have "
                    f"{usual.get(key, 'none')}"
                )


def _not_whole(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not the state of a run: {problem}; resume from an older checkpoint, --resume "
        f"{path.parent}/step-<n>"
    )


def require_position(position: Position, num_batches: int) -> None:
    """Check a position.

    Args:
        position: the saved one.
        num_batches: number of batches in an epoch.

    Raises:
        CheckpointError: it is behind the end of the epoch.
    """
    if position.batch > num_batches:
        raise CheckpointError(
            f"--resume: position.batch: {position.batch}, but an epoch has {num_batches} batches; "
            "resume from an older checkpoint"
        )


def require_network(state: Mapping[str, Tensor | StoredTensor], network: nn.Module) -> None:
    """Check that weights and statistics are those of a network, and finite; sharded ones are
    checked when they are read.

    Buffers other than running statistics may hold infinities, as masks of attention do.

    Args:
        state: the saved state of the network.
        network: the network that is to take it.

    Raises:
        CheckpointError: naming the tensor.
    """
    wanted = network.state_dict(keep_vars=True)
    finite = finite_names(network)
    for name in wanted.keys() | state.keys():
        here, saved = wanted.get(name), state.get(name)
        problem = None
        if here is None or saved is None:
            problem = "the network has no such tensor" if here is None else "missing"
        elif (here.dtype, full_shape(here)) != (saved.dtype, saved.shape):
            wanted_shape = list(full_shape(here))
            problem = f"wanted {here.dtype} {wanted_shape}, found {saved.dtype} {list(saved.shape)}"
        elif isinstance(saved, StoredTensor):
            continue
        elif name in finite and not bool(torch.isfinite(saved).all()):
            problem = "has NaN or infinite elements"
        if problem is not None:
            raise CheckpointError(
                f"--resume: network.{name[:100]}: {problem}; resume from an older checkpoint"
            )


def require_options(state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Check the options of the optimizer's parameter groups, such as learning rates.

    Args:
        state: the saved state of the optimizer, of the right types.
        optimizer: the optimizer that is to take it.

    Raises:
        CheckpointError: naming the option.
    """
    for number, (saved, group) in enumerate(zip(state["groups"], optimizer.param_groups)):
        options = saved["options"]
        for name, here in group.items():
            # Other versions of torch have other options; all but this one follow from the settings.
            given = options.get(name, None if name == "lr" else here)
            if name != "params" and not _is_alike(given, here):
                raise CheckpointError(
                    f"--resume: optimizer.groups.{number}.options.{name}: {_shown(given)} is not "
                    f"of the kind of {_shown(here)}; resume from an older checkpoint"
                )


def _shown(value: Any) -> str:
    return " ".join(str(value).split())[:50]


def _is_alike(value: Any, other: Any) -> bool:
    if isinstance(other, (list, tuple)):
        is_list = isinstance(value, (list, tuple)) and len(value) == len(other)
        return is_list and all(map(_is_alike, value, other))
    if other is None or isinstance(other, bool):
        return value is None or isinstance(value, bool)
    if isinstance(other, (int, float)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    return type(value) is type(other)


def schedule_state(
    fresh: Mapping[str, Any], saved: Mapping[str, Any], num_groups: int
) -> dict[str, Any]:
    """The state of a learning rate schedule to load.

    Args:
        fresh: the state of the new schedule.
        saved: the saved one, of the right types.
        num_groups: number of the optimizer's parameter groups.

    Raises:
        CheckpointError: it is of another number of parameter groups.
    """
    fields = _ScheduleSchema.model_validate(saved).model_dump(by_alias=True)
    for key in ("base_lrs", "_last_lr"):
        if len(fields[key]) != num_groups:
            raise CheckpointError(
                f"--resume: schedule.{key}: wanted {num_groups} numbers, found {len(fields[key])}; "
                "resume from an older checkpoint"
            )
    return {**fresh, **fields}
