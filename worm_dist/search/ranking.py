"""Ranking: from the scores of a check to its mask."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor, nn

from ..config import WormConfig
from ..errors import NonFiniteError
from .cut import cut
from .groups import ChannelGroup, Groups
from .mask import Mask
from .pools import pools_of
from .rounding import is_rounded, rounded
from .scores import score_of

__all__ = ["Ranking"]


class Ranking:
    """Scores candidates and cuts masks, as the settings say.

    Args:
        config: of the engine.
        network: not wrapped.
        groups: that are searched.
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
        self._score = score_of(search, network, groups, own)
        self._pools = pools_of(
            self._score.sizes, search.prune_ratio, search.threshold, search.ratios
        )
        # What cannot be met is told here, not after the first epoch.
        num_candidates = sum(self._score.sizes.values())
        nothing_lost = torch.zeros(groups.num_channels, dtype=torch.bool)
        self.cut(torch.zeros(num_candidates), nothing_lost)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Candidates of each group, or of each norm, in the order of the scores."""
        return self._score.sizes

    @property
    def scales(self) -> list[nn.Parameter]:
        """The parameters that the penalty shrinks."""
        return self._score.scales

    def penalty(self, used: Container[nn.Parameter] | None = None) -> Tensor:
        """The L1 norm of all scales, or of those in use; a differentiable scalar."""
        return self._score.penalty(used)

    def scores(self) -> Tensor:
        """float32 ``[candidates]`` on the network's device, as this rank sees them."""
        return self._score()

    def replicated(self, scores: Tensor) -> Mapping[str, Tensor]:
        """What of the scores must be the same bits on every rank, by name."""
        if not self._score.replicated:
            return {}
        sizes = self._score.sizes
        return dict(zip(sizes, scores.split(list(sizes.values())), strict=True))

    def cut(self, scores: Tensor, lost: Tensor) -> tuple[Mask, Mask, tuple[str, ...]]:
        """The masks that follow from scores which all ranks share.

        Args:
            scores: float ``[candidates]``.
            lost: bool ``[num_channels]``, channels that cannot be kept any more.

        Returns:
            The mask over the candidates, exact to the candidate, by which the search is judged; the
            mask over the groups' channels, rounded, that is frozen and drawn; and the groups or
            norms in which the floor spared a channel.

        Raises:
            NonFiniteError: a score is NaN or infinite.
        """
        search, score = self._config.search, self._score
        try:
            candidates, floored = cut(
                scores, score.sizes, self._pools, search.floor, score.candidates(lost)
            )
        except NonFiniteError as error:
            raise score.failure or error from None
        return candidates, self._rounded(score.channels(candidates), scores, lost), floored

    def _rounded(self, mask: Mask, scores: Tensor, lost: Tensor) -> Mask:
        spared = Mask.from_vector(mask.sizes, ~lost)
        # What rounding spared when these began to fade would be dropped now, a few channels at each
        # check, and the search would not come to rest.
        if self._is_near(spared, mask) and self._nearest(spared, scores, lost) is spared:
            return spared
        return self._nearest(mask, scores, lost)

    def _nearest(self, mask: Mask, scores: Tensor, lost: Tensor) -> Mask:
        scores, widths = self._score.of_channels(scores), self._groups.widths
        floor, round_to = self._config.search.floor, self._config.ticket.round_to
        return rounded(mask, scores, round_to, floor, lost, widths)

    def _is_near(self, spared: Mask, mask: Mask) -> bool:
        """Whether what is lost alone is as much as was asked for, up to what rounding makes of it.

        Pools of channels are asked for so many, whatever each of them has lost already; pools of
        single norms are not, and the mask itself has to say.
        """
        widths, round_to = self._groups.widths, self._config.ticket.round_to
        if not any(is_rounded(n * widths[name], round_to) for name, n in mask.sizes.items()):
            return False
        num_lost = spared.num_channels - spared.num_kept
        num_asked = mask.num_channels - mask.num_kept
        if mask.sizes == self._score.sizes:
            sizes = [sum(mask.sizes[name] for name in pool.groups) for pool in self._pools]
            num_asked = sum(p.num_dropped(n) for p, n in zip(self._pools, sizes, strict=True))
        return num_lost > 0 and 2 * abs(num_lost - num_asked) <= round_to * max(widths.values())
