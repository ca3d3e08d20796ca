"""Scale: how large a benchmark is, and the loop that all of them share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..models import build_model
from .network import over_ranks
from .variants import WARM_UP, Batch, Step, Variant

__all__ = ["FULL", "QUICK", "Scale", "alternate"]

_PATIENCE = 240.0
"""Seconds for all rounds: over a slow network there are fewer."""
_FEWEST = 3


@dataclass(frozen=True)
class Scale:
    """How large a benchmark is.

    Attributes:
        model: whose gradients are sent, in CIFAR form.
        model_of_checks: whose channels are scored.
        rounds: how often every contender is measured, if the network is fast enough.
    """

    model: str
    model_of_checks: str
    rounds: int

    def build(self) -> nn.Module:
        return build_model(self.model, 10, 3)

    def batch(self) -> Batch:
        """Two images for each rank: the less there is to compute, the more the traffic shows."""
        random = torch.Generator().manual_seed(dist.get_rank())
        images = torch.randn(2, 3, 32, 32, generator=random)
        return images, torch.randint(10, (2,), generator=random)


FULL = Scale("resnet18", "torchvision/resnet50", rounds=10)
QUICK = Scale("resnet20", "resnet20", rounds=2)


def alternate(
    contenders: Sequence[Variant], rounds: int, measure: Callable[[Step], float]
) -> list[list[float]]:
    """Measure every contender once in every round, so that a busy minute strikes them all.
    Collective.

    Returns:
        For every contender what was measured in each round; the same number of rounds on all ranks.
    """
    for contender in contenders:
        for _ in range(WARM_UP):
            contender.step()
        if contender.ideal is not None:
            # What has faded has left by now, and nothing is rounded less than it should be.
            share = contender.sent_share()
            assert share is not None and math.isclose(share, contender.ideal), contender
    begin = time.perf_counter()
    values = [[measure(contender.step)] for contender in contenders]
    ((seconds,),) = over_ranks([[time.perf_counter() - begin]], dist.ReduceOp.MAX)
    for _ in range(1, min(rounds, max(_FEWEST, int(_PATIENCE / seconds)))):
        for mine, contender in zip(values, contenders, strict=True):
            mine.append(measure(contender.step))
    return values
