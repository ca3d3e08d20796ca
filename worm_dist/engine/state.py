"""State: the schema of an engine's saved state, and its validation against an engine.

A state has three parts: ``shared`` is equal on all ranks, ``history`` is rank zero's, ``rank``
differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, ValidationError, model_validator
from torch import Size
from typing_extensions import Self

from ..config import WormConfig
from ..digest import digest_of
from ..distributed.collectives import Communicator
from ..errors import CheckpointError, ConfigError
from ..groups.channel_groups import Groups
from ..groups.nested import tensors_in
from ..interval import Interval
from ..schema import Count, Finite, Integers, Schema, first_problem
from ..search.convergence import HistorySchema
from ..settings import Settings
from ..verdict import Phase
from .check_schedule import CheckScheduleSchema
from .context import ContextRankSchema, ContextSchema
from .dropped_channels import DroppedChannelsSchema
from .state_vectors import complaints

__all__ = [
    "FORMAT",
    "DenseNetwork",
    "EngineSchema",
    "RankSchema",
    "agreed_settings",
    "digests_of",
    "rank_state_of",
    "require_valid",
]

FORMAT = 4

_MAY_CHANGE = frozenset({"ticket.recalibrate_batches", "ticket.recalibrate_memory_mb"})
"""Settings that may differ from the saved ones: they only affect a later draw."""


class _VerdictSchema(Schema):
    phase: Phase = Field(strict=False)
    stage: bool
    ticket: bool
    new_mask: bool
    elbow: bool
    settled: bool
    distance_mean: Finite | None
    distance_max: Finite | None
    generation: Count
    live_fraction: Finite
    removed_fraction: Finite
    paused: bool


class _SharedSchema(Schema):
    settings: dict[str, Any]
    groups: dict[str, str]
    verdict: _VerdictSchema
    checks_dropped: Integers
    schedule: CheckScheduleSchema
    training: ContextSchema
    dropped: DroppedChannelsSchema

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if any(True for _ in tensors_in(self.settings)):
            odd = next(key for key, value in self.settings.items() if [*tensors_in(value)])
            raise ValueError(f"settings.{odd[:100]} has a tensor")
        return self


def _require_losses(losses: list[Any]) -> list[Any]:
    # An integer would be accepted as a float, but make an integer tensor.
    if len(losses) not in (0, 2) or any(type(loss) is not float for loss in losses):
        raise ValueError("must be none or two floats")
    return losses


class RankSchema(Schema):
    """Schema of the part ``rank``."""

    number: Count
    world_size: Count
    losses: Annotated[list[Any], AfterValidator(_require_losses)]
    training: ContextRankSchema


class EngineSchema(Schema):
    """Schema of a state without the part ``rank``."""

    format: Count
    shared: _SharedSchema
    history: HistorySchema | None


class _StateSchema(EngineSchema):
    rank: RankSchema


class DenseNetwork(NamedTuple):
    """What a state is compared with of the network before any draw.

    Attributes:
        groups: its channel groups.
        shapes: the shapes of its parameters, by name.
        candidates: number of ranked channels by group or norm, in score order.
    """

    groups: Groups
    shapes: Mapping[str, Size]
    candidates: Mapping[str, int]


def agreed_settings(
    comm: Communicator, config: WormConfig, score: object, lengths: Mapping[str, int | None]
) -> dict[str, Any]:
    """All settings of an engine as plain values, by dotted key, compared across the ranks.

    Args:
        comm: the communicator of the data-parallel ranks.
        config: the settings.
        score: the custom importance, or None; its name is one of the settings.
        lengths: the arguments of ``attach`` in steps; compared, but none of the settings.

    Raises:
        DivergenceError: the ranks have different settings.
    """
    name = None if score is None else getattr(score, "__qualname__", type(score).__name__)
    settings = {**_plain(config), "score": name}
    compared = {**settings, **lengths}
    parts = {key: repr(value).encode() for key, value in compared.items()}
    comm.assert_equal({"setting": parts}, "attach")
    return settings


def _plain(config: Settings, prefix: str = "") -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Settings):
            plain |= _plain(value, f"{prefix}{name}.")
        else:
            plain[f"{prefix}{name}"] = str(value) if isinstance(value, Interval) else value
    return plain


def require_valid(
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    dense: DenseNetwork,
    steps_per_epoch: int | None,
    comm: Communicator,
) -> None:
    """Check that an engine can restore a state.

    Args:
        state: the state.
        settings: the engine's settings, by dotted key.
        dense: its network.
        steps_per_epoch: the argument of ``attach``, or None.
        comm: the communicator of the data-parallel ranks.

    Raises:
        CheckpointError: the state is malformed, of another network, or lacks this rank's part.
        ConfigError: the settings differ.
    """
    found = state.get("format") if isinstance(state, Mapping) else None
    if found != FORMAT:
        raise CheckpointError(
            f"load_state_dict: format: wanted {FORMAT}, found {found}; is it what "
            "engine.state_dict() gave, in this version of worm_dist?"
        )
    try:
        valid = _StateSchema.model_validate(dict(state))
    except ValidationError as error:
        raise CheckpointError(f"load_state_dict: {first_problem(error)}") from error
    shared = valid.shared
    _require_settings(shared.settings, settings)
    _require_groups(shared.groups, dense.groups)
    _require_candidates(valid.history, dense.candidates)
    removes = [settings[f"truncation.{key}"] for key in ("mode", "frozen_weights")]
    channels = (
        shared.checks_dropped,
        shared.dropped,
        shared.verdict.phase,
        dense.groups,
        dense.shapes,
    )
    for complaint in complaints(*channels, removes == ["hard", "remove"]):
        raise CheckpointError(f"load_state_dict: shared.{complaint}")
    saved = shared.schedule.steps_per_epoch
    if steps_per_epoch is not None and saved is not None and steps_per_epoch != saved:
        raise ConfigError(
            f"load_state_dict: steps_per_epoch: {saved} -> {steps_per_epoch}; go on with the same "
            "data, global batch size and world size"
        )
    _require_rank_state(valid, comm.rank, comm.size)


def _require_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    odd = sorted(saved.keys() ^ now.keys())
    if odd:
        raise CheckpointError(
            f"load_state_dict: shared.settings: {', '.join(odd)[:200]}: missing, or not known in "
            "this version of worm_dist"
        )
    changed = [
        f"{key}: {saved[key]!r} -> {now[key]!r}"
        for key in sorted(now)
        if digest_of(saved[key]) != digest_of(now[key]) and key not in _MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"load_state_dict: settings differ from the saved ones ({'; '.join(changed)}); go on "
            f"with the saved ones (only {' and '.join(sorted(_MAY_CHANGE))} may change), or start "
            "anew"
        )


def _require_groups(saved: Mapping[str, str], groups: Groups) -> None:
    here = {name: digest.hex() for name, digest in groups.digests.items()}
    odd = sorted({name for name, _ in saved.items() ^ here.items()})
    if odd:
        raise CheckpointError(
            f"load_state_dict: groups: {', '.join(odd[:5])}{', ...' if odd[5:] else ''}: these are "
            "not the groups of this network; attach to the dense network, built as it was, also "
            "after the draw"
        )
    if list(saved) != list(here):
        raise CheckpointError("load_state_dict: groups: the network has them in another order")


def _require_candidates(history: HistorySchema | None, candidates: Mapping[str, int]) -> None:
    """Compare the width of the saved masks; a history without checks has none."""
    if history is None or not history.records or [*history.sizes.items()] == [*candidates.items()]:
        return
    odd = sorted({name for name, _ in history.sizes.items() ^ candidates.items()})
    raise CheckpointError(
        "load_state_dict: history.sizes: "
        + (f"{', '.join(odd[:5])[:200]}: not" if odd else "not in the order of")
        + " what this network's search ranks"
    )


def _require_rank_state(state: _StateSchema, rank: int, world_size: int) -> None:
    if rank == 0 and state.history is None:
        raise CheckpointError(
            "load_state_dict: history: missing; rank 0 must load the state that rank 0 saved"
        )
    saved, compression = state.rank, state.shared.settings.get("truncation.compression")
    if compression == "powersgd" and (saved.number, saved.world_size) != (rank, world_size):
        raise CheckpointError(
            f"load_state_dict: rank: this state is of rank {saved.number} of {saved.world_size}, "
            f"and this is rank {rank} of {world_size}; PowerSGD's error feedback differs on each "
            "rank, so let every rank save and load its own state, with the same world size"
        )
    reducer = saved.training.reducer
    if compression == "powersgd" and (reducer is None or reducer.averager is None):
        raise CheckpointError(
            "load_state_dict: rank.training.reducer.averager: missing, but truncation.compression "
            "is powersgd"
        )
    if any(not call.arguments for call in saved.training.inputs or ()):
        raise CheckpointError("load_state_dict: rank.training.inputs: arguments: missing")


def rank_state_of(state: Mapping[str, Any], rank: int, world_size: int) -> Mapping[str, Any] | None:
    """A state's per-rank part; None if another rank has saved it."""
    saved: Mapping[str, Any] = state["rank"]
    return saved if (saved["number"], saved["world_size"]) == (rank, world_size) else None


def digests_of(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Digests, by key, of everything that must be equal on all ranks."""
    shared = dict(state["shared"])
    dropped = {f"dropped.{key}": value for key, value in shared.pop("dropped").items()}
    return {key: digest_of(value) for key, value in {**shared, **dropped}.items()}
