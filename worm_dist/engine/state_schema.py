"""State schema: the schema of an engine's state, and its validation against an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..config import Settings
from ..distributed.digest import digest_of
from ..errors import CheckpointError, ConfigError
from ..groups.channel_groups import Groups
from ..interval import Interval
from ..verdict import Phase

__all__ = ["FORMAT", "digests_of", "plain_settings", "require_valid"]

FORMAT = 2

_MAY_CHANGE = frozenset({"ticket.recalibrate_batches", "ticket.recalibrate_memory_mb"})
"""Settings that may differ from the saved ones: they only affect a later draw."""

_PER_RANK = ("history", "rank")
"""Keys whose values need not be equal on all ranks; nor need byte counts."""


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True
    )


def _is_flags(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.bool or tensor.dim() != 1:
        raise ValueError("must be a one-dimensional bool tensor")
    return tensor


_Flags = Annotated[Tensor, AfterValidator(_is_flags)]
_Count = Annotated[int, Field(ge=0)]


class _Verdict(_Part):
    phase: Phase = Field(strict=False)
    stage: bool
    ticket: bool
    new_mask: bool
    elbow: bool
    settled: bool
    distance_mean: float | None
    distance_max: float | None
    generation: _Count
    live_fraction: float
    left_fraction: float
    paused: bool


class _Traffic(_Part):
    sent_bytes: _Count
    dense_bytes: _Count
    total_sent_bytes: _Count
    total_dense_bytes: _Count
    control_bytes: _Count


class _Training(_Part):
    step: _Count
    last_check: _Count
    steps_per_epoch: _Count | None
    buckets_arranged: bool
    traffic: _Traffic


class _Fade(_Part):
    over_at: Tensor
    under_way: _Flags
    starts: dict[str, Tensor] | None


class _Columns(_Part):
    dropped: _Flags
    probed: _Flags
    sent_for_good: _Flags
    num_probes: _Count


class _Truncation(_Part):
    generation: _Count
    frozen: _Flags
    removal: _Fade | None
    columns: _Columns
    probes: bool


class _Schedule(_Part):
    waiting: Tensor
    num_begun: _Count
    began_at: _Count
    duration: _Count


class _Guard(_Part):
    limit: float
    paused_at: _Count | None


class _Removal(_Part):
    schedule: _Schedule
    guard: _Guard
    patience: _Count
    allowed_at: _Count | None


class _Finding(_Part):
    step: _Count
    distances: tuple[float, ...]
    threshold: float | None
    elbow: bool
    settled: bool
    floored: tuple[str, ...]


class _History(_Part):
    sizes: dict[str, int]
    masks: Tensor
    findings: list[_Finding]


class _Bucket(_Part):
    parameters: list[str]
    left_out: dict[str, Tensor]
    thin: dict[str, Tensor] | None


class _Averaging(_Part):
    passes: _Count
    draws: _Count
    buckets: list[_Bucket]


class _Reduction(_Part):
    sent_bytes: _Count
    dense_bytes: _Count
    averaging: _Averaging | None


class _Call(_Part):
    arguments: list[Any]
    on_cpu: list[bool]
    device: str
    dtype: str
    autocast: bool
    training_norms: list[str]
    copied: bool


class _Rank(_Part):
    number: _Count
    world_size: _Count
    inputs: list[_Call] | None
    reduction: _Reduction | None
    losses: list[float]


class _State(_Part):
    format: _Count
    settings: dict[str, Any]
    groups: dict[str, str]
    phase: Phase = Field(strict=False)
    mask: _Flags | None
    removed: _Flags
    checks_dropped: Tensor
    removal: _Removal
    verdict: _Verdict
    training: _Training
    truncation: _Truncation | None
    history: _History | None
    rank: _Rank | None


def plain_settings(config: Settings, prefix: str = "") -> dict[str, Any]:
    """All settings as plain values, by dotted key."""
    plain: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Settings):
            plain |= plain_settings(value, f"{prefix}{name}.")
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
        valid = _State.model_validate(dict(state))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"load_state_dict: {key}: {first['msg'][:200]}") from error
    _require_settings(valid.settings, settings)
    _require_groups(valid, groups)
    saved = valid.training.steps_per_epoch
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


def _require_groups(state: _State, groups: Groups) -> None:
    here = {name: digest.hex() for name, digest in groups.digests.items()}
    odd = sorted({name for name, _ in state.groups.items() ^ here.items()})
    if odd:
        raise CheckpointError(
            f"load_state_dict: groups: {', '.join(odd[:5])}{', ...' if odd[5:] else ''}: these are "
            "not the groups of this network; attach to the dense network, built as it was, also "
            "after the draw"
        )
    if list(state.groups) != list(here):
        raise CheckpointError("load_state_dict: groups: the network has them in another order")
    dense = groups.num_channels
    vectors = {"mask": (state.mask, dense), "checks_dropped": (state.checks_dropped, dense)}
    vectors["removed"] = (state.removed, dense)
    truncation = state.truncation
    if truncation is not None and state.removed.shape == (dense,):
        left = dense - int(state.removed.sum())
        vectors["truncation.frozen"] = (truncation.frozen, left)
        for name in ("dropped", "probed", "sent_for_good"):
            vectors[f"truncation.columns.{name}"] = (getattr(truncation.columns, name), left)
        if truncation.removal is not None:
            vectors["truncation.removal.over_at"] = (truncation.removal.over_at, left)
            vectors["truncation.removal.under_way"] = (truncation.removal.under_way, left)
    for name, (vector, size) in vectors.items():
        if vector is not None and vector.shape != (size,):
            raise CheckpointError(
                f"load_state_dict: {name}: wanted [{size}], found {list(vector.shape)}"
            )
    waiting = state.removal.schedule.waiting
    if waiting.dim() != 1 or not bool(((waiting >= 0) & (waiting < dense)).all()):
        raise CheckpointError(
            "load_state_dict: removal.schedule.waiting: not one-dimensional channel indices"
        )
    if (state.phase is Phase.TICKET) != (state.truncation is None):
        raise CheckpointError(f"load_state_dict: truncation: contradicts phase {state.phase}")
    if state.phase is Phase.TICKET and state.mask is None:
        raise CheckpointError("load_state_dict: mask: missing, but the ticket has been drawn")


def _require_rank_state(state: _State, rank: int, world_size: int) -> None:
    if rank == 0 and state.history is None:
        raise CheckpointError(
            "load_state_dict: history: missing; rank 0 must load the state that rank 0 saved"
        )
    saved = state.rank
    if state.settings.get("truncation.compression") == "powersgd" and (
        saved is None or (saved.number, saved.world_size) != (rank, world_size)
    ):
        whose = "of no rank" if saved is None else f"of rank {saved.number} of {saved.world_size}"
        raise CheckpointError(
            f"load_state_dict: rank: this state is {whose}, and this is rank {rank} of "
            f"{world_size}; PowerSGD's error feedback differs on each rank, so let every rank save "
            "and load its own state, with the same world size"
        )


def digests_of(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Digests, by key, of everything that must be equal on all ranks."""
    shared = {key: value for key, value in state.items() if key not in _PER_RANK}
    training = {key: value for key, value in state["training"].items() if key != "traffic"}
    return {key: digest_of(value) for key, value in {**shared, "training": training}.items()}
