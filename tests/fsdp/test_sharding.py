"""What the engine knows of a sharding, and keeps of it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from tests.nets import Residual, random_images
from tests.ranks import Ranks
from worm_dist.backends.fsdp import FsdpBackend


def _step_bytes() -> tuple[int, int]:
    """Before and after the first pass, in which torch decides to keep the outer weights."""
    network: Any = Residual()
    fully_shard(network.conv1)
    fully_shard(network)
    before = FsdpBackend(network).step_bytes
    network(random_images(2)).sum().backward()
    return before, FsdpBackend(network).step_bytes


def test_bytes_of_a_step_are_the_same_before_the_first_one(ranks: Ranks) -> None:
    for before, after in ranks(2, _step_bytes):
        assert before == after


def _is_gradient_kept() -> bool:
    network: Any = Residual()
    fully_shard(network)
    backend = FsdpBackend(network)
    network(random_images(2)).sum().backward()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with backend.full_network():
        pass
    gradient = weakref.ref(network.head.weight.grad)
    assert gradient() is not None
    optimizer.zero_grad()
    return gradient() is not None


def test_full_weights_keep_no_gradients_alive(ranks: Ranks) -> None:
    assert ranks(2, _is_gradient_kept) == [False, False]
