"""Saved state: the engine's state between two steps, as plain values, and how it is restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import Communicator, uncounted
from ..verdict import Verdict
from .agreed_search import AgreedSearch
from .check_schedule import CheckSchedule
from .context import TrainingContext
from .dropped_channels import DroppedChannels
from .requirements import require_alike
from .state import FORMAT, DenseNetwork, digests_of, rank_state_of, require_valid

__all__ = ["SavedState"]


@dataclass(frozen=True)
class SavedState:
    """Saves and restores the parts of an engine.

    Attributes:
        comm: the communicator of the data-parallel ranks.
        settings: the engine's settings, by dotted key.
        steps_per_epoch: the argument of ``attach``, or None.
        dense: the network before any draw.
        training, schedule, search, dropped: the parts.
    """

    comm: Communicator
    settings: Mapping[str, Any]
    steps_per_epoch: int | None
    dense: DenseNetwork
    training: TrainingContext
    schedule: CheckSchedule
    search: AgreedSearch
    dropped: DroppedChannels

    def as_dict(self, verdict: Verdict) -> dict[str, Any]:
        """See ``Engine.state_dict``, with the newest verdict.  Collective."""
        with uncounted(self.comm):
            dropped = self.dropped.state_dict()
        digests = self.dense.groups.digests
        return {
            "format": FORMAT,
            "shared": {
                "settings": dict(self.settings),
                "groups": {name: digest.hex() for name, digest in digests.items()},
                "verdict": verdict.as_dict(),
                "checks_dropped": self.search.checks_dropped.clone(),
                "schedule": self.schedule.state_dict(),
                "training": self.training.state_dict(),
                "dropped": dropped,
            },
            "history": self.search.history.state_dict() if self.comm.rank == 0 else None,
            "rank": {
                "number": self.comm.rank,
                "world_size": self.comm.size,
                "losses": self.dropped.guard.rank_state(),
                "training": self.training.rank_state(),
            },
        }

    def restore(self, state: Mapping[str, Any], copies: Sequence[nn.Module], where: str) -> Verdict:
        """Restore a state into the parts of a new engine.  Collective.

        Args:
            state: the result of ``as_dict`` on this rank, or on rank zero.
            copies: copies of the dense network, pruned in the same way.
            where: the caller's name, for errors.

        Returns:
            The verdict that ``as_dict`` was given.

        Raises:
            CheckpointError, ConfigError, DivergenceError: as in ``Engine.load_state_dict``.
        """
        comm, training = self.comm, self.training
        with refused_on_every_rank(comm):
            require_valid(state, self.settings, self.dense, self.steps_per_epoch, comm)
            require_alike(training.network, copies, where)
        comm.assert_equal({"state": digests_of(state)}, where)
        shared, own = state["shared"], rank_state_of(state, comm.rank, comm.size)
        inputs = None if own is None else own["training"]["inputs"]
        device = next(training.network.parameters()).device
        if comm.any(torch.tensor([float(inputs is None)], device=device)):
            inputs = None  # statistics must be estimated from as many inputs on every rank
        training.load_state_dict(
            shared["training"],
            state["rank"]["training"]["traffic"],
            inputs or (),
            statistics_estimated=own is not None
            and inputs is not None
            and own["training"]["statistics_estimated"],
        )
        with uncounted(comm):
            self.dropped.load_state_dict(shared["dropped"], copies)
        if own is not None:
            self.dropped.guard.load_rank_state(own["losses"], device)
        training.load_wrapper_state(
            shared["training"], None if own is None else own["training"]["reducer"]
        )
        self.schedule.load_state_dict(shared["schedule"])
        if comm.rank == 0:
            self.search.history.load_state_dict(state["history"])
        self.search.checks_dropped = shared["checks_dropped"].to("cpu", copy=True)
        return Verdict.from_dict(shared["verdict"])
