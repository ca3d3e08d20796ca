"""Evaluation: all ranks test one network, and pay for few collectives to have it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import Ranks
from worm_dist.training.evaluation import broadcast_buffers


def _statistics() -> tuple[int, int, list[torch.Tensor]]:
    network = nn.Sequential(*(nn.BatchNorm1d(width) for width in (3, 1, 5)), nn.Linear(2, 2))
    network.register_buffer("mask", torch.zeros(2, 3, dtype=torch.float64).t())
    network.register_buffer("nothing", torch.empty(0))
    for number, buffer in enumerate(network.buffers()):
        buffer.fill_(10 * dist.get_rank() + number)
    real, calls = dist.broadcast, []

    def counted(tensor: torch.Tensor, **options: Any) -> Any:
        calls.append(tensor.numel())
        return real(tensor, **options)

    vars(dist)["broadcast"] = counted
    broadcast_buffers(network)
    return len(calls), sum(calls), [buffer.clone() for buffer in network.buffers()]


def test_a_broadcast_for_each_dtype_and_not_for_each_buffer(ranks: Ranks) -> None:
    """It took one for each buffer, 159 for ResNet-50."""
    (num_calls, num_elements, zeros), (_, _, ones) = ranks(2, _statistics)
    assert (num_calls, num_elements) == (3, 2 * (3 + 1 + 5) + 3 + 6)
    assert len(ones) == 11
    for number, (zero, one) in enumerate(zip(zeros, ones, strict=True)):
        assert torch.equal(zero, one) and zero.dtype == one.dtype and zero.stride() == one.stride()
        assert bool((zero == number).all())
