"""Averages that are not what the ranks have put in are noticed, and correct ones never doubted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import DivergenceError, Engine, WormConfig
from worm_dist.comm_hooks.checksums import Checksums


def _truncated(**truncation: Any) -> Engine:
    torch.manual_seed(0)
    model = DistributedDataParallel(Residual(), bucket_cap_mb=0.002)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    config = WormConfig(truncation={"frozen_weights": "hold", "checksums": True, **truncation})
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    engine.truncate(mask_dropping(engine.groups, 0))
    return engine


def _step(engine: Engine, scale: float = 1.0) -> None:
    images = random_images(8, seed=engine.step * 10 + dist.get_rank())
    (scale * engine.model(images).square().mean()).backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def _changed(ranks: list[int], factor: float) -> tuple[str, bool, int]:
    """Train three steps; in the third one element of the second bucket arrives changed.

    Returns:
        The error message, whether the weights are as before that step, and the step.
    """
    engine = _truncated()
    for _ in range(2):
        _step(engine)
    before = [p.detach().clone() for p in engine.model.parameters()]
    real, num_buckets = dist.all_reduce, 0

    def faulty(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
        nonlocal num_buckets
        work = real(tensor, *args, **keywords)
        num_buckets += 1
        if num_buckets == 2 and dist.get_rank() in ranks:
            work.wait()
            tensor[0] += factor * tensor[:-2].square().mean().sqrt()
        return work

    dist.all_reduce = faulty
    try:
        _step(engine)
        message = ""
    except DivergenceError as error:
        message = str(error)
    finally:
        dist.all_reduce = real
    kept = all(map(torch.equal, before, engine.model.parameters()))
    return message, kept, engine.step


@pytest.mark.parametrize("where", [[0, 1], [1]], ids=["on all ranks", "on one"])
def test_a_changed_element_keeps_the_step_from_being_taken(ranks: Ranks, where: list[int]) -> None:
    for rank, (message, kept, step) in enumerate(ranks(2, _changed, where, 0.1)):
        assert bool(message) == (rank in where)
        if message:
            assert kept and step == 2
            assert message.startswith(f"step 3: rank {rank} received an average of")
            assert "without this host" in message


def test_a_change_within_rounding_is_none(ranks: Ranks) -> None:
    for message, kept, step in ranks(2, _changed, [0, 1], 1e-6):
        assert not message and not kept and step == 3


def _trained(compression: str) -> int:
    engine = _truncated(compression=compression)
    for scale in (1.0, 1e-6, 1e3, 1e12, 1e38):
        _step(engine, scale)
    return engine.step


@pytest.mark.parametrize("compression", ["none", "bf16", "fp16"])
def test_rounding_and_overflow_are_no_fault(ranks: Ranks, compression: str) -> None:
    """An overflow is a matter of the loss scale, or of the check for finite gradients."""
    assert ranks(3, _trained, compression) == [5, 5, 5]


def _sent(checksums: bool) -> tuple[list[int], int]:
    """Elements of the all-reduces of one step, and the bytes that the engine counts."""
    engine = _truncated(checksums=checksums)
    for _ in range(2):
        _step(engine)
    real, sent = dist.all_reduce, []

    def counting(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
        sent.append(tensor.numel())
        return real(tensor, *args, **keywords)

    dist.all_reduce = counting
    _step(engine)
    dist.all_reduce = real
    return sent, engine.traffic.sent_bytes


def test_they_are_two_elements_a_bucket_and_can_be_turned_off(ranks: Ranks) -> None:
    ((sent, counted), _), ((plain, plainly_counted), _) = (
        ranks(2, _sent, True),
        ranks(2, _sent, False),
    )
    assert len(sent) == len(plain) > 1
    assert {more - less for more, less in zip(sent, plain, strict=True)} == {2}
    assert counted == plainly_counted == 4 * sum(plain)


@pytest.mark.parametrize("world_size", [2, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_covers_what_many_ranks_round(world_size: int, dtype: torch.dtype) -> None:
    """Added one after another in the dtype that is sent, which is the worst order there is."""
    checksums = Checksums(world_size)
    wire, own = torch.zeros(402, dtype=dtype), torch.empty(402, dtype=dtype)
    for rank in range(world_size):
        generator = torch.Generator().manual_seed(rank)
        own[:400] = torch.randn(400, generator=generator) * torch.logspace(-6, 2, 400) / world_size
        checksums.put(own[:400], own[400:])
        wire += own
    checksums.take([], wire[:400], wire[400:])
    assert checksums.wrong() is None
    wire[399] *= 2.0**30
    checksums.take([], wire[:400], wire[400:])
    assert checksums.wrong() is not None
