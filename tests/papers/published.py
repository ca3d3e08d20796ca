"""The published rules, written from their equations: norm by norm, in plain loops.

Early-Bird: arXiv 1909.11957.  WORM: PMLR 262:232-240.  EarlyBERT: arXiv 2101.00063.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Queue", "batch_norms", "early_bird_mask", "earlybert_masks", "num_differing"]


def batch_norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}


def early_bird_mask(network: nn.Module, ratio: float) -> dict[str, Tensor]:
    """By name of each norm, True for the scales that are strictly above the one global threshold:
    the magnitude of position int(N p) among all of them, in ascending order."""
    norms = batch_norms(network)
    everything = torch.cat([norm.weight.detach().abs() for norm in norms.values()])
    threshold = everything.sort().values[int(len(everything) * ratio)]
    return {name: norm.weight.detach().abs() > threshold for name, norm in norms.items()}


def num_differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> int:
    return sum(int((one[name] != other[name]).sum()) for name in one)


class Queue:
    """The newest masks, of which the newest is compared with all others."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._masks: list[Mapping[str, Tensor]] = []

    def put(self, mask: Mapping[str, Tensor]) -> None:
        self._masks = [*self._masks, mask][-self._length :]

    @property
    def is_full(self) -> bool:
        return len(self._masks) == self._length

    @property
    def shares(self) -> list[Fraction]:
        """The distances of the newest mask to the older ones, oldest first."""
        *older, newest = self._masks
        size = sum(kept.numel() for kept in newest.values())
        return [Fraction(num_differing(newest, mask), size) for mask in older]

    @property
    def distances(self) -> list[float]:
        return [float(share) for share in self.shares]

    def is_ticket(self, settled: str) -> bool:
        """Whether no distance is above the threshold, a decimal number."""
        return self.is_full and not any(share > Fraction(settled) for share in self.shares)

    def is_elbow(self, settled: str, margin: str) -> bool:
        """Whether the mean distance is strictly below the sum of two decimal numbers."""
        threshold = Fraction(settled) + Fraction(margin)
        return self.is_full and sum(self.shares) < threshold * len(self.shares)


def earlybert_masks(
    heads: Sequence[np.ndarray], neurons: Sequence[np.ndarray], head_ratio: float, ratio: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Heads above the quantile of their own layer, and neurons above that of all layers.

    Args:
        heads, neurons: the coefficients of each layer.
        head_ratio, ratio: the shares to drop.
    """
    of_all = np.quantile(np.concatenate(list(neurons)), ratio)
    return (
        [layer > np.quantile(layer, head_ratio) for layer in heads],
        [layer > of_all for layer in neurons],
    )
