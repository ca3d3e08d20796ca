"""Whole buckets, the alternative that packing is compared with, train to the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.bench.test_bench import TINY
from tests.ranks import Ranks
from worm_dist import WormConfig
from worm_dist.bench.step import packing
from worm_dist.bench.variants import dense, training, uniform_mask
from worm_dist.bench.whole_buckets import send_whole
from worm_dist.config import TruncationConfig
from worm_dist.engine.attach import attach
from worm_dist.errors import ConfigError

NAMES = [
    *("DDP", "DDP again", "hook in Python"),
    *("worm 75 %", "worm 75 % whole", "worm 50 %", "worm 50 % whole"),
    *("worm 50 % faded", "worm 50 % faded whole"),
]


def _trained(whole: bool) -> tuple[list[Tensor], float]:
    """The weights after a few steps with half of the channels held, and the share of bytes sent."""
    batch = TINY.batch()
    config = WormConfig(truncation=TruncationConfig(frozen_weights="hold"))
    model, optimizer = training(TINY.build)
    engine = attach(model, optimizer, config, example_inputs=batch[0][:1], steps_per_epoch=1)
    engine.truncate(uniform_mask(engine.groups, 0.5))
    if whole:
        send_whole(engine)
    step = dense(engine.model, engine.optimizer, batch)
    for _ in range(3):
        step()
    share = engine.traffic.sent_bytes / engine.traffic.dense_bytes
    return [p.detach().clone() for p in engine.model.parameters()], share


def _both() -> list[tuple[list[Tensor], float]]:
    return [_trained(whole) for whole in (False, True)]


def test_whole_buckets_give_the_bits_of_packed_ones(ranks: Ranks) -> None:
    for (packed, packed_share), (whole, whole_share) in ranks(2, _both):
        assert all(map(torch.equal, packed, whole))
        assert packed_share < 0.6 and whole_share == 1


def _measured() -> tuple[list[str], list[str]]:
    every = packing(TINY)
    assert all(row.processor is not None and row.processor.median > 0 for row in every.rows)
    some = dataclasses.replace(TINY, only=("worm 50 %",))
    with pytest.raises(ConfigError, match="--only: there is no variant 'worm'"):
        packing(dataclasses.replace(TINY, only=("worm",)))
    return [row.name for row in every.rows], [row.name for row in packing(some).rows]


@pytest.mark.slow("takes steps of every variant on real ranks")
def test_every_variant_is_measured_or_those_asked_for(ranks: Ranks) -> None:
    for every, some in ranks(2, _measured):
        assert every == NAMES
        assert some == ["DDP", "worm 50 %"]
