"""Memory that the engine will hold, logged when it is attached: before it is needed."""

from __future__ import annotations

import logging

from ..config import WormConfig
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from ..groups.full_shape import full_numel
from ..search.equal_shares import equal_shares
from ..search.ranking import Ranking
from ..truncation.memory import num_held_moments, truncation_memory
from .context import TrainingContext

__all__ = ["log_memory"]

logger = logging.getLogger(__name__)


def log_memory(
    training: TrainingContext, ranking: Ranking, groups: Groups, config: WormConfig
) -> None:
    """Log on rank zero what the engine will hold from the elbow on, if all groups lose about the
    same share; after the draw it holds nothing of that.

    Args:
        training: the training.
        ranking: the ranking of these groups.
        groups: the channel groups of the network.
        config: the settings.
    """
    truncation = config.truncation
    if (
        training.comm.rank != 0
        or truncation.mode != "hard"
        or not logger.isEnabledFor(logging.INFO)
    ):
        return
    mask = equal_shares(ranking, groups)
    plan = FreezePlan(training.network, groups, ~mask.keep, truncation.scope)
    view = training.optimizer_view
    memory = truncation_memory(
        plan,
        plan,
        training.trained if training.backend.averages else (),
        view.shards,
        truncation,
        num_held_moments(view.optimizer),
    )
    parameters = list(training.network.parameters())
    weights = sum(full_numel(parameter) * parameter.element_size() for parameter in parameters)
    logger.info(
        "while channels are frozen the engine will hold about %.1f MiB on a rank, %.0f %% of the "
        "weights' %.1f: copies of frozen weights %.1f, of their optimizer state %.1f, packed "
        "gradients %.1f, indices %.1f%s; besides up to %d MiB of recorded inputs",
        *(memory.total / 2**20, 100 * memory.total / weights, weights / 2**20),
        *(memory.weights / 2**20, memory.moments / 2**20),
        *(memory.buffers / 2**20, memory.indices / 2**20),
        "; without ZeRO's gather of the weights" if view.shared else "",
        config.ticket.recalibrate_memory_mb if training.inputs.is_on else 0,
    )
