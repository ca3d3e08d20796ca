"""Data loaders for each rank's share of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ...errors import ConfigError
from ..preemption import exit_with_parent_only
from ..run_config import DataConfig
from .augmentation_rng import EpochSampler, SeededSamples, seed_from
from .dataset import Data
from .validation import ValidatedSamples

__all__ = ["test_loader", "train_loader"]


def train_loader(
    data: Data, config: DataConfig, rank: int, world_size: int, seed: int, device: torch.device
) -> DataLoader[Any]:
    """Loader of this rank's training batches, shuffled and augmented.

    A batch has ``config.batch_size / world_size`` samples.  Every rank has the same number of
    batches; samples that do not fill a batch on all ranks are dropped, different ones in every
    epoch.  Call ``loader.sampler.set_epoch(epoch)`` before each epoch: order and augmentation
    depend only on ``seed`` and ``epoch``.  The global random state is not changed.

    Raises:
        ConfigError: the batch cannot be divided evenly, or the split is smaller than a batch.
        DamagedSampleError: raised during iteration by a sample that cannot be used.
    """
    batch_size = _per_rank(config, world_size)
    num_samples = len(data.train)
    if num_samples < config.batch_size:
        raise ConfigError(
            f"data.batch_size: {config.batch_size} is more than the {num_samples} samples of the "
            "training split; no epoch would have a step"
        )
    samples = SeededSamples(ValidatedSamples(data.train, "training", data.num_classes), seed)
    sampler = EpochSampler(
        samples, num_replicas=world_size, rank=rank, shuffle=True, seed=seed, drop_last=True
    )
    generator = torch.Generator().manual_seed(seed_from(seed, rank))
    return _loader(samples, config, batch_size, device, sampler, generator)


def test_loader(
    data: Data, config: DataConfig, rank: int, world_size: int, device: torch.device
) -> DataLoader[Any]:
    """Loader of every ``world_size``-th sample of the test split, starting at ``rank``.

    Together the ranks have every sample exactly once, so that summed counts are exact.  A rank may
    have one batch less than another, so no collective may run per batch.

    Raises:
        ConfigError: the batch cannot be divided evenly, or the split is empty.
        DamagedSampleError: raised during iteration by a sample that cannot be used.
    """
    num_samples = len(data.test)
    if num_samples == 0:
        raise ConfigError("data: the test split is empty, so the network cannot be evaluated")
    samples = ValidatedSamples(data.test, "test", data.num_classes)
    share = Subset(samples, range(rank, num_samples, world_size))
    generator = torch.Generator().manual_seed(rank)
    return _loader(share, config, _per_rank(config, world_size), device, None, generator)


def _loader(
    samples: Dataset[Any],
    config: DataConfig,
    batch_size: int,
    device: torch.device,
    sampler: Sampler[Any] | None,
    generator: torch.Generator,
) -> DataLoader[Any]:
    """Build a loader; only training, which has a ``sampler``, drops the last, smaller batch.

    Without the ``generator``, the loader processes would be seeded from the global random state.
    """
    return DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=device.type == "cuda",
        generator=generator,
        worker_init_fn=exit_with_parent_only,
    )


def _per_rank(config: DataConfig, world_size: int) -> int:
    share, rest = divmod(config.batch_size, world_size)
    if rest:
        below, above = share * world_size, (share + 1) * world_size
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"data.batch_size: {config.batch_size} is not divisible by {world_size} ranks; "
            f"use {nearest}"
        )
    return share
