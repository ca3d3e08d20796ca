"""Ranking: from the scores of a check to its mask."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor, nn

from ..config import WormConfig
from ..errors import NonFiniteError
from ..groups.channel_groups import ChannelGroup, Groups
from .budgets import pools_of
from .importance import importance_measure
from .mask import Mask
from .rounding import rounded
from .select import select_channels

__all__ = ["Ranking"]


class Ranking:
    """Scores candidates and cuts masks, as the settings say.

    Masks are over the channels of the dense network, also when some of them have been removed:
    these rank below all others.

    Args:
        config: of the engine.
        network: not wrapped.
        groups: that are searched, of the dense network.
        own: the user's own score, if there is one.

    Raises:
        ConfigError: the ratios and the floor contradict each other on this network, or a pattern
            of ``search.ratios`` has no effect.
    """

    def __init__(
        self,
        config: WormConfig,
        network: nn.Module,
        groups: Groups,
        own: Callable[[nn.Module, ChannelGroup], Tensor] | None,
    ) -> None:
        search = config.search
        self._config = config
        self._groups = groups
        self._own = own
        self._score = importance_measure(search, network, groups, own)
        self._candidates = self._score.candidates
        self._removed = torch.zeros(self._candidates.number, dtype=torch.bool)
        self._pools = pools_of(self.sizes, search.prune_ratio, search.threshold, search.ratios)
        # What cannot be met is told here, not after the first epoch.
        nothing_lost = torch.zeros(groups.num_channels, dtype=torch.bool)
        self.select(torch.zeros(self._candidates.number), nothing_lost)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Candidates of each group, or of each norm, in the order of the scores; of the dense
        network."""
        return self._candidates.sizes

    @property
    def scales(self) -> list[nn.Parameter]:
        """The parameters that the penalty shrinks."""
        return self._score.scales

    def follow(self, network: nn.Module, groups: Groups, removed: Tensor) -> None:
        """Rank the channels that are left.

        Args:
            network: the smaller one.
            groups: of the smaller network.
            removed: bool ``[num_channels]``, which of the dense network's channels are gone.
        """
        self._score = importance_measure(self._config.search, network, groups, self._own)
        self._removed = self._candidates.flags(removed)

    def penalty(self, used: Container[nn.Parameter] | None = None) -> Tensor:
        """The L1 norm of all scales, or of those in use; a differentiable scalar."""
        return self._score.penalty(used)

    def scores(self) -> Tensor:
        """float32 ``[candidates left]`` on the network's device, as this rank sees them."""
        return self._score()

    def replicated(self, scores: Tensor) -> Mapping[str, Tensor]:
        """What of the scores must be the same bits on every rank, by name."""
        if not self._score.replicated:
            return {}
        sizes = self._score.candidates.sizes
        return dict(zip(sizes, scores.split(list(sizes.values())), strict=True))

    def select(self, scores: Tensor, lost: Tensor) -> tuple[Mask, Mask, tuple[str, ...]]:
        """The masks that follow from scores which all ranks share.

        Args:
            scores: float ``[candidates left]``.
            lost: bool ``[num_channels]``, channels that cannot be kept any more; what is removed is
                among them.

        Returns:
            The mask over the candidates, exact to the candidate, by which the search is judged; the
            mask over the groups' channels, rounded, that is frozen and drawn; and the groups or
            norms in which the floor spared a channel.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """
        search, candidates = self._config.search, self._candidates
        scores = self._among_all(scores)
        try:
            kept, floored = select_channels(
                scores, candidates.sizes, self._pools, search.floor, candidates.flags(lost)
            )
        except NonFiniteError as error:
            raise self._score.failure or error from None
        return kept, self._rounded(candidates.mask(kept), scores, lost), floored

    def importance(self, scores: Tensor) -> Tensor:
        """Of scores that all ranks share, one for every channel of the dense network: float
        ``[num_channels]`` on the CPU, zero where it is removed."""
        return self._candidates.importance(self._among_all(scores))

    def _among_all(self, scores: Tensor) -> Tensor:
        everything = torch.zeros(self._candidates.number, dtype=scores.dtype)
        everything[~self._removed] = scores.detach().cpu()
        return everything

    def _rounded(self, mask: Mask, scores: Tensor, lost: Tensor) -> Mask:
        importance, widths = self._candidates.importance(scores), self._groups.widths
        floor, round_to = self._config.search.floor, self._config.ticket.round_to
        return rounded(mask, importance, round_to, floor, lost, widths)
