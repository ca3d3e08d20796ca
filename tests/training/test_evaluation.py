"""Evaluation: all ranks test one network, and pay for few collectives to have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.faults.trainers import small_trainer
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


def _tested(precision: str) -> tuple[list[torch.dtype], float, float]:
    """Dtypes of the head in tests, their loss, and that of a test written by hand."""
    trainer = small_trainer(precision=precision)
    network, seen = trainer._parts.network, []
    head = list(network.children())[-1]
    head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    loss = trainer._evaluate().loss
    total, count = 0.0, 0
    network.eval()
    for images, classes in trainer._parts.test_loader:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        total += float(nn.functional.cross_entropy(logits.float(), classes, reduction="sum"))
        count += len(classes)
    return seen, loss, total / count


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("tf32", torch.float32)]
)
def test_a_run_is_tested_in_the_precision_in_which_it_trains(
    ranks: Ranks, precision: str, dtype: torch.dtype
) -> None:
    """Runs in bf16 were tested in float32: another network than the one in training, and on a GPU
    at half of its speed."""
    ((seen, loss, expected),) = ranks(1, _tested, precision)
    assert set(seen) == {dtype}
    assert loss == pytest.approx(expected, rel=1e-6)
