"""Agreed ranking: the ranking of all ranks, with the same cost model if there is a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..config import WormConfig
from ..digest import digest_of
from ..distributed.agreed_failure import refused_on_every_rank
from ..errors import ConfigError
from ..groups.channel_groups import ChannelGroup, Groups
from ..pruning.predicted_cost import predicted_cost
from ..search.ranking import Ranking
from .context import TrainingContext

__all__ = ["agreed_ranking"]


def agreed_ranking(
    config: WormConfig,
    training: TrainingContext,
    groups: Groups,
    custom: Callable[[nn.Module, ChannelGroup], Tensor] | None,
    example_inputs: Any,
) -> Ranking:
    """Build the ranking, and compare its cost model across the ranks.  Collective.

    Args:
        config, groups, custom: as for ``Ranking``.
        training: the training of the network that is ranked.
        example_inputs: inputs as for ``forward.run``.

    Raises:
        ConfigError: as in ``Ranking`` and ``predicted_cost``; with a budget on every rank.
        DivergenceError: the ranks predict different costs.
    """
    network, ranks = training.network, training.comm
    if config.search.budget.chosen is None:
        return Ranking(config, network, groups, custom, full_values=training.full_values)
    with refused_on_every_rank(ranks, ConfigError):
        with training.full_network() as full:
            cost = predicted_cost(config, full, groups, example_inputs)
        ranking = Ranking(config, network, groups, custom, cost, training.full_values)
    assert cost is not None
    parts = [cost.dense, cost.coefficients, cost.fixed, cost.per_channel]
    ranks.assert_equal({"state": {"search.budget": digest_of(parts)}}, "attach")
    return ranking
