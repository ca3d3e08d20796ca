"""State: the schema of an engine's saved state, and its validation against an engine.

A state has three parts: ``shared`` is equal on all ranks, ``history`` is rank zero's, ``rank``
differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError
from torch import Tensor

from ..config import Settings, WormConfig
from ..digest import digest_of
from ..distributed.collectives import Communicator
from ..errors import CheckpointError, ConfigError
from ..groups.channel_groups import Groups
from ..interval import Interval
from ..schema import Count, Schema, first_problem
from ..search.convergence import HistorySchema
from ..verdict import Phase
from .check_schedule import CheckScheduleSchema
from .context import ContextRankSchema, ContextSchema
from .dropped_channels import DroppedChannelsSchema

__all__ = ["FORMAT", "agreed_settings", "digests_of", "rank_state_of", "require_valid"]

FORMAT = 3

_MAY_CHANGE = frozenset({"ticket.recalibrate_batches", "ticket.recalibrate_memory_mb"})
"""Settings that may differ from the saved ones: they only affect a later draw."""


class _VerdictSchema(Schema):
    phase: Phase = Field(strict=False)
    stage: bool
    ticket: bool
    new_mask: bool
    elbow: bool
    settled: bool
    distance_mean: float | None
    distance_max: float | None
    generation: Count
    live_fraction: float
    removed_fraction: float
    paused: bool


class _SharedSchema(Schema):
    settings: dict[str, Any]
    groups: dict[str, str]
    verdict: _VerdictSchema
    checks_dropped: Tensor
    schedule: CheckScheduleSchema
    training: ContextSchema
    dropped: DroppedChannelsSchema


class _RankSchema(Schema):
    number: Count
    world_size: Count
    losses: list[float]
    training: ContextRankSchema


class _StateSchema(Schema):
    format: Count
    shared: _SharedSchema
    history: HistorySchema | None
    rank: _RankSchema


def agreed_settings(
    comm: Communicator, config: WormConfig, score: object, steps_per_epoch: int | None
) -> dict[str, Any]:
    """All settings of an engine as plain values, by dotted key, compared across the ranks.

    Args:
        comm: the communicator of the data-parallel ranks.
        config: the settings.
        score: the custom importance, or None; its name is one of the settings.
        steps_per_epoch: the argument of ``attach``; compared, but not one of the settings.

    Raises:
        DivergenceError: the ranks have different settings.
    """
    name = None if score is None else getattr(score, "__qualname__", type(score).__name__)
    settings = {**_plain(config), "score": name}
    compared = {**settings, "steps_per_epoch": steps_per_epoch}
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
    groups: Groups,
    steps_per_epoch: int | None,
    rank: int,
    world_size: int,
) -> None:
    """Check that an engine can restore a state.

    Args:
        state: the state.
        settings: the engine's settings, by dotted key.
        groups: the channel groups of its network.
        steps_per_epoch: the argument of ``attach``, or None.
        rank, world_size: this process's rank, and the number of processes.

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
    _require_groups(shared, groups)
    saved = shared.schedule.steps_per_epoch
    if steps_per_epoch is not None and saved is not None and steps_per_epoch != saved:
        raise ConfigError(
            f"load_state_dict: steps_per_epoch: {saved} -> {steps_per_epoch}; go on with the same "
            "data, global batch size and world size"
        )
    _require_rank_state(valid, rank, world_size)


def _require_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and key not in _MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"load_state_dict: settings differ from the saved ones ({'; '.join(changed)}); go on "
            f"with the saved ones (only {' and '.join(sorted(_MAY_CHANGE))} may change), or start "
            "anew"
        )


def _require_groups(shared: _SharedSchema, groups: Groups) -> None:
    here = {name: digest.hex() for name, digest in groups.digests.items()}
    odd = sorted({name for name, _ in shared.groups.items() ^ here.items()})
    if odd:
        raise CheckpointError(
            f"load_state_dict: groups: {', '.join(odd[:5])}{', ...' if odd[5:] else ''}: these are "
            "not the groups of this network; attach to the dense network, built as it was, also "
            "after the draw"
        )
    if list(shared.groups) != list(here):
        raise CheckpointError("load_state_dict: groups: the network has them in another order")
    dropped, dense = shared.dropped, groups.num_channels
    vectors = {"shared.checks_dropped": (shared.checks_dropped, dense)}
    vectors["shared.dropped.removed"] = (dropped.removed, dense)
    if dropped.mask is not None:
        vectors["shared.dropped.mask"] = (dropped.mask, dense)
    if dropped.truncation is not None:
        num_left = dense - int(dropped.removed.sum())
        for name, vector in dropped.truncation.vectors().items():
            vectors[f"shared.dropped.truncation.{name}"] = (vector, num_left)
    for name, (vector, size) in vectors.items():
        if vector.shape != (size,):
            raise CheckpointError(
                f"load_state_dict: {name}: wanted [{size}], found {list(vector.shape)}"
            )
    waiting = dropped.removal.schedule.waiting
    if waiting.dim() != 1 or not bool(((waiting >= 0) & (waiting < dense)).all()):
        raise CheckpointError(
            "load_state_dict: shared.dropped.removal.schedule.waiting: not one-dimensional channel "
            "indices"
        )
    phase = shared.verdict.phase
    if (phase is Phase.TICKET) != (dropped.truncation is None):
        raise CheckpointError(
            f"load_state_dict: shared.dropped.truncation: contradicts phase {phase}"
        )
    if phase is Phase.TICKET and dropped.mask is None:
        raise CheckpointError(
            "load_state_dict: shared.dropped.mask: missing, but the ticket was drawn"
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


def rank_state_of(state: Mapping[str, Any], rank: int, world_size: int) -> Mapping[str, Any] | None:
    """A state's per-rank part; None if another rank has saved it."""
    saved: Mapping[str, Any] = state["rank"]
    return saved if (saved["number"], saved["world_size"]) == (rank, world_size) else None


def digests_of(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Digests, by key, of everything that must be equal on all ranks."""
    shared = dict(state["shared"])
    dropped = {f"dropped.{key}": value for key, value in shared.pop("dropped").items()}
    return {key: digest_of(value) for key, value in {**shared, **dropped}.items()}
