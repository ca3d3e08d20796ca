"""Workload of a benchmark, and the measurement loop that all benchmarks share."""

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

__all__ = ["FULL", "QUICK", "Workload", "alternate"]

_TIME_LIMIT = 240.0
"""Seconds for all rounds; over a slow network the number of rounds is reduced."""
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Workload:
    """Workload of a benchmark.

    Attributes:
        model: name of the model that is trained, on 32x32 images.
        checked_model: name of the model for checks and checkpoints.
        rounds: number of measurements of every variant, if the network is fast enough.
    """

    model: str
    checked_model: str
    rounds: int

    def build(self) -> nn.Module:
        return build_model(self.model, 10, 3)

    def batch(self) -> Batch:
        """Create a batch of two images, small so that communication dominates the step."""
        generator = torch.Generator().manual_seed(dist.get_rank())
        images = torch.randn(2, 3, 32, 32, generator=generator)
        return images, torch.randint(10, (2,), generator=generator)


FULL = Workload("resnet18", "torchvision/resnet50", rounds=10)
QUICK = Workload("resnet20", "resnet20", rounds=2)


def alternate(
    variants: Sequence[Variant], rounds: int, measure: Callable[[Step], float]
) -> list[list[float]]:
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
