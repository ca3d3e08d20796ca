"""Training state: what a run is saved as, and goes on from bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.network_state import full_network_state, load_network_state, network_state
from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import ProcessGroupComm, uncounted
from ..engine.attachment import context_of
from .build import TrainingParts
from .parallelize import num_passes
from .precision import autocast
from .rank_state import (
    Position,
    gathered_on_rank_zero,
    newest_images,
    num_inputs,
    rank_state,
    restore_random,
    with_inputs,
)
from .reporting.phase_stats import PhaseStats
from .run_config import RunConfig
from .run_state import (
    FORMAT,
    require_network,
    require_options,
    require_position,
    schedule_state,
)

__all__ = ["TrainingState"]


class TrainingState:
    """The state of a training between two steps: that of its parts, and that of its loop.

    Args:
        config: the run's settings.
        parts: the parts of the training.
        device: the device that it trains on.

    Attributes:
        position: where the loop is.
        losses: float64 ``[2]``, sum and number of this rank's losses in the epoch so far.
        phase_stats: what each phase has taken so far.
    """

    def __init__(self, config: RunConfig, parts: TrainingParts, device: torch.device) -> None:
        self._config = config
        self._parts = parts
        self._device = device
        self.position = Position()
        self.losses = torch.zeros(2, dtype=torch.float64, device=device)
        self.phase_stats = PhaseStats(parts.result)

    def state_dict(self, report: Mapping[str, Any], *, sharded: bool = False) -> dict[str, Any]:
        """The complete state on rank zero, an incomplete one on other ranks.  Collective.

        The tensors are the live ones, not copies.

        Args:
            report: the state of the run's report.
            sharded: whether every rank is to have its part of sharded state, ``LocalShards``; else
                it is gathered on rank zero.
        """
        parts = self._parts
        network: Mapping[str, Any] = network_state(parts.network)
        if not sharded:
            assert dist.group.WORLD is not None
            network = full_network_state(network, ProcessGroupComm(dist.group.WORLD, self._device))
        engine = parts.engine.state_dict()
        optimizer = parts.engine.optimizer_state(sharded=sharded)
        rank_states = gathered_on_rank_zero(rank_state(self.losses, engine), self._device)
        return {
            "format": FORMAT,
            "position": asdict(self.position),
            "engine": {key: part for key, part in engine.items() if key != "rank"},
            "network": network,
            "optimizer": optimizer,
            "schedule": parts.schedule.state_dict(),
            "rewound": parts.retraining.state_dict(),
            "ranks": rank_states,
            "result": parts.result.as_dict(),
            "phase_stats": self.phase_stats.state_dict(),
            "report": report,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state; nothing has been trained yet.  Collective.

        With the same world size the run continues bit-identically.  With another one each step
        has the same samples, but sums of floats have another order.

        Args:
            state: rank zero's state dict, as ``require_valid`` accepts it and ``share_state``
                returns it: in place of ``ranks`` it has this rank's own state, ``rank``.

        Raises:
            CheckpointError, ConfigError: the state belongs to another run, or a rank cannot load
                its part of it; raised on every rank.
        """
        parts, engine = self._parts, self._parts.engine
        comm, own_state = context_of(engine).comm, state["rank"]
        with uncounted(comm), refused_on_every_rank(comm):
            self.position = Position(**state["position"])
            require_position(self.position, len(parts.train_loader))
            rank = with_inputs(own_state, self._newest_inputs(num_inputs(own_state)))
        engine.load_state_dict({**state["engine"], "rank": rank}, parts.retraining.copies)
        with uncounted(comm), refused_on_every_rank(comm):
            require_network(state["network"], parts.network)
            load_network_state(parts.network, state["network"])
            require_options(state["optimizer"], engine.optimizer)
        engine.load_optimizer_state(state["optimizer"])
        with uncounted(comm), refused_on_every_rank(comm):
            self._load_rest(state)
        if engine.step:
            parts.network.train()
            engine.restore_bucket_order(self.one_pass)

    def _load_rest(self, state: Mapping[str, Any]) -> None:
        """Load what follows the engine, the weights and the optimizer."""
        parts, own_state = self._parts, state["rank"]
        parts.retraining.load_state_dict(state["rewound"], self.position)
        fresh, num_groups = parts.schedule.state_dict(), len(state["optimizer"]["groups"])
        parts.schedule.load_state_dict(schedule_state(fresh, state["schedule"], num_groups))
        self.losses = torch.tensor(own_state["losses"], dtype=torch.float64, device=self._device)
        parts.result.restore(state["result"])
        self.phase_stats.load_state_dict(state["phase_stats"])
        restore_random(own_state["random"], self._config.seed, parts.engine.step)

    def one_pass(self) -> Tensor:
        """The loss of a forward pass on the newest batch."""
        position, parts = self.position, self._parts
        (images,) = newest_images(parts.train_loader, position.epoch, position.batch, 1)
        # In the run's precision, or it would need more memory than any step of the run.
        with autocast(self._config.precision, parts.network):
            logits: Tensor = parts.engine.model(parts.placement.inputs(images))
        return logits.float().mean() + parts.engine.penalty()

    def _newest_inputs(self, count: int) -> list[Tensor]:
        """The inputs of the newest passes, oldest first."""
        position, placement = self.position, self._parts.placement
        passes = num_passes(self._parts.engine)
        num_batches = -(-count // passes)
        batches = newest_images(
            self._parts.train_loader, position.epoch, position.batch, num_batches
        )
        inputs = [part for batch in batches for part in placement.inputs(batch).chunk(passes)]
        return inputs[len(inputs) - count :]
