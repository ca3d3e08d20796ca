"""Scale: how large a benchmark is, and the loop that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..models import build_model
from .contenders import WARM_UP, Batch, Contender, Step

__all__ = ["FULL", "QUICK", "Scale", "alternate"]


@dataclass(frozen=True)
class Scale:
    """How large a benchmark is.

    Attributes:
        model: whose gradients are sent, in CIFAR form.
        model_of_checks: whose channels are scored.
        rounds: how often every contender is measured.
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
    contenders: Sequence[Contender], rounds: int, measure: Callable[[Step], float]
) -> list[list[float]]:
    """Measure every contender once in every round, so that a busy minute strikes them all.

    Returns:
        For every contender what was measured in each round.
    """
    for contender in contenders:
        for _ in range(WARM_UP):
            contender.step()
    values: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for mine, contender in zip(values, contenders, strict=True):
            mine.append(measure(contender.step))
    return values
