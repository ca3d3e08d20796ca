"""Equal shares: the mask that is assumed before there are scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups.channel_groups import Groups
from ..groups.mask import Mask
from .ranking import Ranking

__all__ = ["equal_shares"]


def equal_shares(ranking: Ranking, groups: Groups) -> Mask:
    """The mask that a search would select if all groups had the same distribution of scores.

    If norms are ranked separately, the same holds for every norm.  So all groups lose about the
    same share, except for the effects of minimum ratios, rounding and per-group ratios.

    Args:
        ranking: the ranking of these groups.
        groups: the channel groups of the dense network.
    """
    quantiles = [(_scattered(size) + 0.5) / size for size in ranking.sizes.values()]
    none_removed = torch.zeros(groups.num_channels, dtype=torch.bool)
    _, mask, _ = ranking.select(torch.cat(quantiles), none_removed)
    return mask


def _scattered(size: int) -> Tensor:
    """float64 ``[size]``: the numbers below ``size`` in an order that is always the same.

    All channels of a group cost the same, but where parameters are cut into a part for each rank,
    the first channels of all would be on one rank.  Norms that are ranked by themselves and share
    channels have the same size, so they agree.
    """
    generator = torch.Generator().manual_seed(size)
    return torch.randperm(size, generator=generator, dtype=torch.float64)
