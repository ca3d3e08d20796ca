"""Workload of a benchmark, and the measurement loop that all benchmarks share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..models import build_model
from .network import over_ranks
from .variants import DDP, WARM_UP, Batch, Step, Variant

__all__ = ["FULL", "QUICK", "Workload", "alternate"]

_TIME_LIMIT = 240.0
"""Seconds for all rounds; over a slow network the number of rounds is reduced."""
_FEWEST_ROUNDS = 3

_Measured = TypeVar("_Measured")


@dataclass(frozen=True)
class Workload:
    """Workload of a benchmark.

    Attributes:
        model: name of the model that is trained.
        checked_model: name of the model for checks and checkpoints.
        rounds: number of measurements of every variant, if the network is fast enough.
        images: images of a rank in a step; by default few, so that communication dominates it.
        side: height and width of an image in pixels.
        only: names of the variants to measure beside DDP; empty for all.
    """

    model: str
    checked_model: str
    rounds: int
    images: int = 2
    side: int = 32
    only: tuple[str, ...] = ()

    def wants(self, name: str) -> bool:
        """Whether to measure the variant of this name."""
        return not self.only or name in (DDP, *self.only)

    def __str__(self) -> str:
        """The model and its batch, for a reader."""
        return f"{self.model}, {self.images} images of {self.side}x{self.side} a rank"

    def build(self) -> nn.Module:
        return build_model(self.model, 10, 3)

    def batch(self) -> Batch:
        """Create the batch of every step."""
        generator = torch.Generator().manual_seed(dist.get_rank())
        images = torch.randn(self.images, 3, self.side, self.side, generator=generator)
        return images, torch.randint(10, (self.images,), generator=generator)


FULL = Workload("resnet18", "torchvision/resnet50", rounds=10)
QUICK = Workload("resnet20", "resnet20", rounds=2)


def alternate(
    variants: Sequence[Variant], rounds: int, measure: Callable[[Step], _Measured]
) -> list[list[_Measured]]:
    """Measure every variant once per round, so that a busy machine slows all alike.  Collective.

    Args:
        variants: the variants to measure.
        rounds: largest number of rounds.
        measure: takes a variant's step and returns the measured value.

    Returns:
        The values of every variant, one per round; the number of rounds is equal on all ranks.
    """
    for variant in variants:
        for _ in range(WARM_UP):
            variant.step()
        if variant.ideal is not None:
            # The warm-up must have reached the steady state: fades done, compression active.
            share = variant.sent_share()
            assert share is not None and math.isclose(share, variant.ideal), variant
    begin = time.perf_counter()
    values = [[measure(variant.step)] for variant in variants]
    ((seconds,),) = over_ranks([[time.perf_counter() - begin]], dist.ReduceOp.MAX)
    for _ in range(1, min(rounds, max(_FEWEST_ROUNDS, int(_TIME_LIMIT / seconds)))):
        for own_values, variant in zip(values, variants, strict=True):
            own_values.append(measure(variant.step))
    return values
