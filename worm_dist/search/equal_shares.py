"""Equal shares: the mask that is assumed before there are scores."""

from __future__ import annotations

import torch

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
    # All channels of a group cost the same, so it does not matter which of them rank highest.
    quantiles = [
        1 - (torch.arange(size, dtype=torch.float64) + 0.5) / size
        for size in ranking.sizes.values()
    ]
    none_removed = torch.zeros(groups.num_channels, dtype=torch.bool)
    _, mask, _ = ranking.select(torch.cat(quantiles), none_removed)
    return mask
