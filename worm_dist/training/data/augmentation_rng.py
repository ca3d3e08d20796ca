"""Augmentation that can be replayed: it depends on the seed, the epoch and the sample alone.

Transforms draw from torch's one global random state.  What a sample is given there would depend on
the samples before it, on how many loader processes there are and how long they have lived, so that
a resumed run would see other images than the run that was never killed.  Therefore the sampler
hands out (epoch, index) pairs, and the state is set from them for the time of one sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from .samples import Samples

__all__ = ["EpochSampler", "Replayed", "seed_from"]


def seed_from(*numbers: int) -> int:
    """32 well-mixed bits, which is what torch's generator on the CPU uses of a seed."""
    return zlib.crc32(" ".join(map(str, numbers)).encode())


class EpochSampler(DistributedSampler[Any]):
    """A :class:`DistributedSampler` of (epoch, index) pairs; ``set_epoch`` as ever."""

    _first = 0

    def start_at(self, epoch: int, sample: int) -> None:
        """Begin in an epoch, after so many samples of this rank, which are not read; ``set_epoch``
        begins at its beginning."""
        self.set_epoch(epoch)
        self._first = sample

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._first = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, indices = self.epoch, super().__iter__()
        return ((epoch, index) for index in islice(indices, self._first, None))


class Replayed(Dataset[Any]):
    """``samples``, asked for by (epoch, index), each under a random state of its own."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        # Not torch.manual_seed: that would reseed the devices too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(self.seed, epoch, index))
            return self.samples[index]
