"""Reproducible augmentation: it depends only on the seed, the epoch and the sample's index.

Transforms draw from torch's global random state.  By default a sample's augmentation would depend
on the samples before it and on the number and age of the loader processes, and a resumed run would
see other images than an uninterrupted one.  Therefore the sampler yields (epoch, index) pairs, and
the random state is seeded from them while one sample is loaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from .dataset import Samples

__all__ = ["EpochSampler", "SeededSamples", "seed_from"]


def seed_from(*numbers: int) -> int:
    """Hash numbers to a 32-bit seed; torch's CPU generator uses no more bits of a seed."""
    return zlib.crc32(" ".join(map(str, numbers)).encode())


class EpochSampler(DistributedSampler[Any]):
    """A :class:`DistributedSampler` that yields (epoch, index) pairs."""

    _first = 0

    def start_at(self, epoch: int, sample: int) -> None:
        """Start within an epoch; the samples before are skipped without being read.

        Args:
            epoch: the epoch.
            sample: number of this rank's samples to skip.
        """
        self.set_epoch(epoch)
        self._first = sample

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._first = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, indices = self.epoch, super().__iter__()
        return ((epoch, index) for index in islice(indices, self._first, None))


class SeededSamples(Dataset[Any]):
    """A data set indexed by (epoch, index) that loads each sample under its own random state.

    Args:
        samples: the augmented samples.
        seed: the run's seed.
    """

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        # torch.manual_seed would also reseed the GPUs.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(self.seed, epoch, index))
            return self.samples[index]
