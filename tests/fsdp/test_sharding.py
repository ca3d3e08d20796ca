"""What the engine knows of a sharding, and keeps of it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import worm_dist
from tests.fsdp.trainee import full
from tests.nets import Residual, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.resuming import differences
from tests.settings import at_once
from worm_dist import WormConfig
from worm_dist.backends.fsdp import FsdpBackend
from worm_dist.backends.fsdp_sharding import Sharding


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


@contextmanager
def _interrupted_at(line: int) -> Iterator[None]:
    """A context in which an interrupt comes at this line of those that ``take_off`` runs."""
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code is not Sharding.take_off.__code__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _described(network: nn.Module) -> dict[str, Any]:
    return {
        name: [
            type(module),
            {key: id(p) for key, p in module._parameters.items()},
            {key: id(p.grad) for key, p in module._parameters.items() if p is not None},
            [id(hook) for hook in module._forward_pre_hooks.values()],
            [id(hook) for hook in module._forward_hooks.values()],
            len(module._state_dict_pre_hooks),
            sorted(map(str, vars(module))),
        ]
        for name, module in network.named_modules()
    }


def _interrupted() -> tuple[int, list[str]]:
    """How often the sharding was interrupted on its way off, and what was not as before."""
    network: Any = Residual()
    fully_shard(network.conv1)
    fully_shard([network.bn1, network.bn2])
    fully_shard(network)
    backend = FsdpBackend(network)
    network(random_images(2)).sum().backward()
    before, num_interrupts = _described(backend.network), 0
    wrong: list[str] = []
    while True:
        try:
            with _interrupted_at(num_interrupts), backend.full_network():
                break
        except KeyboardInterrupt:
            num_interrupts += 1
        wrong += differences(before, _described(backend.network), f"line {num_interrupts}")
    gradient = full(network.head.weight.grad)
    network.zero_grad()
    network(random_images(2)).sum().backward()
    wrong += differences(gradient, full(network.head.weight.grad), "in the end")
    return num_interrupts, wrong


def test_an_interrupt_on_the_way_to_full_weights_leaves_the_network_sharded(ranks: Ranks) -> None:
    """Modules came out half of them plain, and trained on unsharded weights that nothing reduced,
    or failed."""
    for num_interrupts, wrong in ranks(2, _interrupted):
        assert num_interrupts > 50
        assert not wrong, "\n".join(wrong[:20])


def _drawn_at_rest() -> list[tuple[Any, ...]]:
    """What trains, and what is counted, after a draw while two layers rest: one of them always."""
    found = []
    for rests in (False, True):
        torch.manual_seed(0)
        network: Any = Residual()
        network.head.bias.requires_grad_(False)
        fully_shard(network.conv1)
        fully_shard(network)
        optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
        config = WormConfig(
            search={"every": "1ba", "l1": 0.0},
            truncation={"frozen_weights": "hold", **at_once(2)},
            ticket={"recalibrate_batches": 0},
        )
        engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
        network.conv1.requires_grad_(not rests)
        engine.draw(mask_dropping(engine.groups, 0, 3))
        trains = {name for name, p in network.named_parameters() if not p.requires_grad}
        names = {p: name for name, p in network.named_parameters()}
        averaged = sorted(names[p] for p in engine._training.trained)
        found.append((trains, averaged, engine._training.num_elements))
    return found


def test_a_layer_that_rests_during_a_draw_is_averaged_later(ranks: Ranks) -> None:
    """The new sharding was asked what requires gradients at the moment, and not the old one."""
    for whole, resting in ranks(2, _drawn_at_rest):
        assert whole[0] == {"head.bias"} and resting[0] == {"head.bias", "conv1.weight"}
        assert whole[1:] == resting[1:]
        assert "conv1.weight" in resting[1] and "head.bias" not in resting[1]
