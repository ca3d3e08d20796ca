"""Ranking: computes the mask of a check from the scores."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import SearchConfig, WormConfig
from ..errors import NonFiniteError
from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.cost_model import CostModel
from ..groups.mask import Mask
from .budgets import Budget, Pool, pools_of
from .importance import importance_measure
from .rounding import rounded
from .scale_index import FullValues, detached
from .select import not_empty, quantiles, select_channels

__all__ = ["Ranking"]


class Ranking:
    """Scores candidates and selects masks according to the settings.

    Masks cover the channels of the dense network, also after some have been removed; removed
    channels rank below all others.

    Args:
        config: the engine's settings.
        network: the unwrapped network.
        groups: the searched groups of the dense network.
        custom: the user's score function, or None.
        cost: the cost of what ``search.budget`` limits, as a function of the kept channels; None
            without a budget.
        full_values: as for ``ScaleIndex``.

    Attributes:
        budget: the budget that masks meet; None without one.

    Raises:
        ConfigError: ratios or budget contradict the floor on this network, or a pattern of
            ``search.ratios`` has no effect.
    """

    def __init__(
        self,
        config: WormConfig,
        network: nn.Module,
        groups: Groups,
        custom: Callable[[nn.Module, ChannelGroup], Tensor] | None,
        cost: CostModel | None = None,
        full_values: FullValues = detached,
    ) -> None:
        search = config.search
        self._config = config
        self._groups = groups
        self._custom = custom
        self._full_values = full_values
        self._importance = importance_measure(search, network, groups, custom, full_values)
        self._candidates = self._importance.candidates
        self._removed = torch.zeros(self._candidates.number, dtype=torch.bool)
        self.budget = _budget(search, cost, groups)
        self._pools: Sequence[Pool | Budget] = (
            pools_of(self.sizes, search.prune_ratio, search.threshold, search.ratios)
            if self.budget is None
            else [self.budget]
        )
        # Raises now, rather than after the first epoch, if the floor contradicts the others.
        self.select(torch.zeros(self._candidates.number), self.none_removed)

    @property
    def none_removed(self) -> Tensor:
        """bool ``[num_channels]``: flags of no channel."""
        return torch.zeros(self._groups.num_channels, dtype=torch.bool)

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of candidates of each group or norm of the dense network, in score order."""
        return self._candidates.sizes

    @property
    def scales(self) -> list[nn.Parameter]:
        """The parameters that the L1 penalty applies to."""
        return self._importance.scales

    @property
    def is_replicated(self) -> bool:
        """Whether scores depend on weights alone, and not on a rank's data; see ``Importance``."""
        return self._importance.replicated

    @property
    def reads_weights(self) -> bool:
        """Whether ``scores`` needs a network with full weights; see ``Importance``."""
        return self._importance.reads_weights

    def follow(self, network: nn.Module, groups: Groups, removed: Tensor) -> None:
        """Switch to the smaller network after channels have been removed.

        Args:
            network: the smaller network, unwrapped.
            groups: the channel groups of the smaller network.
            removed: bool ``[num_channels]``, the removed channels of the dense network.
        """
        self._importance = importance_measure(
            self._config.search, network, groups, self._custom, self._full_values
        )
        self._removed = self._candidates.flags(removed)

    def penalty(self, used: Container[nn.Parameter] | None = None) -> Tensor:
        """Return the L1 norm of all scales, or of those in ``used``, as a differentiable scalar."""
        return self._importance.penalty(used)

    def scores(self) -> Tensor:
        """Return this rank's scores, float32 ``[remaining candidates]`` on the network's device."""
        return self._importance()

    def replicated(self, scores: Tensor) -> Mapping[str, Tensor]:
        """Return the scores that must be bit-identical on all ranks, by group or norm."""
        if not self.is_replicated:
            return {}
        sizes = self._importance.candidates.sizes
        return dict(zip(sizes, scores.split(list(sizes.values())), strict=True))

    def select(self, scores: Tensor, irreversible: Tensor) -> tuple[Mask, Mask, tuple[str, ...]]:
        """Select the masks from scores that are equal on all ranks.

        Args:
            scores: float ``[remaining candidates]``.
            irreversible: bool ``[num_channels]``, channels that cannot be kept any more, including
                the removed ones.

        Returns:
            The exact mask over the candidates, whose distances decide convergence; the rounded mask
            over the groups' channels, which is frozen and drawn; and the names of groups or norms
            in which the floor kept a channel, or which keep their best one although the exact mask
            drops them all.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """
        search, candidates = self._config.search, self._candidates
        scores, gone = self._over_dense_candidates(scores), candidates.flags(irreversible)
        by_rank = self.budget is not None and search.threshold == "layer"
        try:
            order = quantiles(scores, candidates.sizes, gone) if by_rank else scores
            kept, floored = select_channels(
                order,
                candidates.sizes,
                self._pools,
                search.min_keep_ratio,
                gone,
                search.selection,
            )
        except NonFiniteError as error:
            raise self._importance.failure or error from None
        importance = candidates.importance(scores).masked_fill(irreversible, -torch.inf)
        mask, rescued = not_empty(candidates.mask(kept), importance)
        return kept, self._rounded(mask, scores, irreversible), floored + rescued

    def dropped_scales(self, kept: Mask) -> dict[str, Tensor] | None:
        """By name of every scale parameter, which of its elements a mask over the candidates drops,
        bool ``[elements]``; None unless every norm is ranked separately."""
        return self._importance.dropped_scales(kept)

    def importance(self, scores: Tensor) -> Tensor:
        """Convert scores to channel scores of the dense network: float ``[num_channels]`` on the
        CPU, zero for removed channels."""
        return self._candidates.importance(self._over_dense_candidates(scores))

    def _over_dense_candidates(self, scores: Tensor) -> Tensor:
        dense = torch.zeros(self._candidates.number, dtype=scores.dtype)
        dense[~self._removed] = scores.detach().cpu()
        return dense

    def _rounded(self, mask: Mask, scores: Tensor, irreversible: Tensor) -> Mask:
        importance, widths = self._candidates.importance(scores), self._groups.widths
        floor, round_to = self._config.search.min_keep_ratio, self._config.ticket.round_to
        return rounded(mask, importance, round_to, floor, irreversible, widths, self.budget)


def _budget(search: SearchConfig, cost: CostModel | None, groups: Groups) -> Budget | None:
    chosen = search.budget.chosen
    assert (chosen is None) == (cost is None)
    return None if chosen is None or cost is None else Budget(*chosen, cost, groups.sizes)
