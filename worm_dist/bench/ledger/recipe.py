"""Recipe: the network that a run starts from, its settings, and what is removed at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...config import WormConfig
from ...groups.channel_groups import Groups
from ...groups.mask import Mask

__all__ = ["RandomRemoval", "Recipe"]


@dataclass(frozen=True)
class RandomRemoval:
    """Channels that are dropped at random, as many of each group as another run has dropped.

    Attributes:
        epoch: the epochs after which they are dropped.
        widths: the number of kept channels of each group.
        seed: seed of the choice.
        gradual: whether they leave one after another from then on, or at once.
    """

    epoch: float
    widths: Mapping[str, int]
    seed: int
    gradual: bool

    def mask(self, groups: Groups) -> Mask:
        """The mask over the dense network's groups."""
        generator = torch.Generator().manual_seed(self.seed)
        orders = {
            group.name: torch.randperm(group.num_channels, generator=generator) for group in groups
        }
        return Mask({name: order < self.widths[name] for name, order in orders.items()})


@dataclass(frozen=True)
class Recipe:
    """What to train.

    Attributes:
        network: the network, newly initialised.
        config: settings of the engine.
        random_removal: what is dropped instead of the mask of the search, if anything.
        hook: name of plain DDP's compression hook, if any.
    """

    network: nn.Module
    config: WormConfig
    random_removal: RandomRemoval | None = None
    hook: str | None = None
