"""Live is exact and frozen is free: packed gradients against plain DDP with frozen ones zeroed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.gradients import gradient
from tests.nets import Residual, random_images, randomise
from tests.oracles import live_flags, mask_dropping, zero_frozen
from tests.ranks import Ranks
from worm_dist import WormConfig

pytestmark = pytest.mark.slow("every packing beside masked gradients, a quarter of a minute")

GENERATIONS = [(0, 3, 9), (3, 4, 10, 12), (0, 1)]  # channels 0, 9, 4, ... thaw again
STEPS_EACH = 3


def _network() -> Residual:
    torch.manual_seed(0)
    network = Residual()
    randomise(network, seed=3)
    return network


def _backward(model: nn.Module, step: int, passes: int = 1) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for number in range(passes):
        images = random_images(8, seed=(step * passes + number) * size + rank)
        model(images).square().mean().backward()


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def _train_both(
    generations: list[tuple[int, ...]], scope: str, arguments: dict[str, Any], passes: int = 1
) -> dict[str, Any]:
    """Train with an engine and by hand; the largest relative differences, and the bytes.

    The reference is plain DDP, with frozen gradients zeroed and frozen weights written back.
    """
    network, reference = _network(), _network()
    model = DistributedDataParallel(network, **arguments)
    plain = DistributedDataParallel(reference, **arguments)
    optimizers = [
        SGD(n.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01) for n in (network, reference)
    ]
    engine = worm_dist.attach(
        model,
        optimizers[0],
        WormConfig(truncation={"frozen_weights": "hold", "scope": scope}),
        example_inputs=random_images(1),
        steps_per_epoch=10,
    )
    differences, sent, expected_bytes, dense = [], [], [], []
    flags = {n: torch.ones_like(p, dtype=torch.bool) for n, p in reference.named_parameters()}
    for generation, dropped in enumerate([(), *generations]):
        if generation > 0:
            mask = mask_dropping(engine.groups, *dropped)
            engine.truncate(mask)
            flags = live_flags(reference, engine.groups, ~mask.keep, scope)
        held = {name: p.detach().clone() for name, p in reference.named_parameters()}
        for step in range(generation * STEPS_EACH, (generation + 1) * STEPS_EACH):
            for optimizer in optimizers:
                optimizer.zero_grad()
            _backward(model, step, passes)
            _backward(plain, step, passes)
            zero_frozen(reference, flags)
            for key, mine in _gradients(network).items():
                other = gradient(reference.get_parameter(key))
                if torch.equal(mine, other):
                    differences.append(0.0)
                else:
                    differences.append(float((mine - other).norm() / other.norm()))
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                for key, p in reference.named_parameters():
                    p.copy_(torch.where(flags[key], p, held[key]))
                    optimizers[1].state[p]["momentum_buffer"][~flags[key]] = 0
            sent.append(engine.traffic.sent_bytes)
            dense.append(engine.traffic.dense_bytes)
            expected_bytes.append(4 * sum(int(f.sum()) for f in flags.values()) * passes)
    equal = all(
        torch.equal(value, reference.state_dict()[key])
        for key, value in network.state_dict().items()
    )
    return {
        "difference": max(differences),
        "weights equal": equal,
        "sent": sent,
        "expected": expected_bytes,
        "dense": dense,
        "generation": engine.check().generation,
    }


@pytest.mark.parametrize("scope", ["norm", "producer", "coupled"])
@pytest.mark.parametrize("view", [False, True], ids=["", "bucket-view"])
@pytest.mark.parametrize("cap", [0.001, None], ids=["tiny", "default"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.fault(18, "tiny and usual buckets through several generations")
def test_live_gradients_are_bit_equal_and_bytes_are_exact(
    ranks: Ranks, world_size: int, cap: float | None, view: bool, scope: str
) -> None:
    arguments: dict[str, Any] = {"gradient_as_bucket_view": view}
    if cap is not None:
        arguments["bucket_cap_mb"] = cap
    for result in ranks(world_size, _train_both, GENERATIONS, scope, arguments):
        assert result["difference"] == 0
        assert result["weights equal"]
        assert result["sent"] == result["expected"]
        assert set(result["dense"]) == {4 * sum(p.numel() for p in Residual().parameters())}


@pytest.mark.slow("trains on three and four ranks")
@pytest.mark.parametrize("world_size", [3, 4])
def test_on_more_ranks_only_the_order_of_the_sum_differs(ranks: Ranks, world_size: int) -> None:
    """A ring adds in an order that depends on the place in the buffer, and packing moves places."""
    for result in ranks(world_size, _train_both, GENERATIONS, "producer", {}):
        assert result["difference"] < 1e-5
        assert result["sent"] == result["expected"]


@pytest.mark.parametrize("view", [False, True], ids=["", "bucket-view"])
def test_a_bucket_in_which_nothing_lives_is_not_sent(ranks: Ranks, view: bool) -> None:
    """All channels of the inner group freeze: in tiny buckets whole buckets are empty."""
    inner = tuple(range(8, 14))
    arguments = {"bucket_cap_mb": 0.0001, "gradient_as_bucket_view": view}
    for result in ranks(2, _train_both, [inner], "coupled", arguments):
        assert result["difference"] == 0 and result["weights equal"]
        assert result["sent"] == result["expected"]


@pytest.mark.parametrize("scope", ["norm", "producer", "coupled"])
def test_everything_but_the_floor_may_freeze(ranks: Ranks, scope: str) -> None:
    nearly_all = (*range(1, 8), *range(9, 14))
    for result in ranks(2, _train_both, [nearly_all], scope, {}):
        assert result["difference"] == 0 and result["weights equal"]
        assert result["sent"] == result["expected"]


def test_gradients_accumulated_over_two_passes_are_packed_twice(ranks: Ranks) -> None:
    for result in ranks(2, _train_both, GENERATIONS, "producer", {}, 2):
        assert result["difference"] == 0 and result["weights equal"]
        truncated = slice(STEPS_EACH, None)
        assert result["sent"][truncated] == result["expected"][truncated]


def _train_with_no_sync(arguments: dict[str, Any]) -> tuple[float, int, int]:
    network, reference = _network(), _network()
    model = DistributedDataParallel(network, **arguments)
    plain = DistributedDataParallel(reference, **arguments)
    optimizer = SGD(network.parameters(), lr=0.05)
    engine = worm_dist.attach(
        model,
        optimizer,
        WormConfig(truncation={"frozen_weights": "hold"}),
        example_inputs=random_images(1),
        steps_per_epoch=10,
    )
    mask = mask_dropping(engine.groups, 0, 9)
    engine.truncate(mask)
    flags = live_flags(reference, engine.groups, ~mask.keep, "producer")
    for wrapped in (model, plain):
        with wrapped.no_sync():
            _backward(wrapped, 0)
        _backward(wrapped, 1)
    zero_frozen(reference, flags)
    difference = max(
        float((mine - gradient(reference.get_parameter(key))).abs().max())
        for key, mine in _gradients(network).items()
    )
    optimizer.step()
    live = sum(int(f.sum()) for f in flags.values())
    return difference, engine.traffic.sent_bytes, 4 * live


@pytest.mark.parametrize("view", [False, True], ids=["", "bucket-view"])
def test_accumulation_without_synchronisation_sends_once(ranks: Ranks, view: bool) -> None:
    arguments = {"gradient_as_bucket_view": view}
    for difference, sent, expected in ranks(2, _train_with_no_sync, arguments):
        assert difference == 0 and sent == expected


def _wrong_sums() -> tuple[list[float], list[float]]:
    """Pack by masks on which the ranks do not agree; count the same on both."""
    gradient = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    live = torch.tensor([0, 1]) if dist.get_rank() == 0 else torch.tensor([2, 3])
    payload = gradient[live]
    dist.all_reduce(payload)
    return gradient[live].tolist(), payload.tolist()


@pytest.mark.fault(15, "if nobody looked: wrong sums without an error")
def test_why_agreement_comes_first(ranks: Ranks) -> None:
    """Channels that differ in place but not in number are summed without any error: rank 0 adds
    its channels 0 and 1 to rank 1's channels 2 and 3, and each believes it has its own."""
    (first, sum_on_first), (second, sum_on_second) = ranks(2, _wrong_sums)
    assert (first, second) == ([1, 10], [100, 1000])
    assert sum_on_first == sum_on_second == [101, 1010]  # right would be [2, 20] and [200, 2000]
