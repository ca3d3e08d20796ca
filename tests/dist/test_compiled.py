"""torch.compile: compiled once, whatever is truncated; once more after the draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from worm_dist import WormConfig


def _run(compiled: bool) -> tuple[list[int], list[torch.Tensor], list[int]]:
    """Graphs compiled after each stage, the final weights, the bytes sent."""
    torch.manual_seed(0)
    network: nn.Module = Residual()
    randomise(network, seed=1)
    counter = CompileCounterWithBackend("aot_eager")
    called: Any = torch.compile(network, backend=counter) if compiled else network
    model = DistributedDataParallel(called) if dist.is_initialized() else called
    config = WormConfig(truncation={"frozen_weights": "hold"})
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    frames, sent = [], []
    for drops in ((), (0, 9), (3, 10), (3, 9), "draw"):
        if drops == "draw":
            engine.draw(engine.mask)
        elif drops:
            engine.truncate(mask_dropping(engine.groups, *drops))
        for _ in range(2):
            images = random_images(4, seed=engine.step)
            engine.optimizer.zero_grad()
            engine.model(images).square().mean().backward()
            engine.optimizer.step()
            sent.append(engine.traffic.sent_bytes)
        frames.append(counter.frame_count)
    # Statistics were not estimated at the draw: names of norms began with the compiled wrapper's.
    state = [*network.parameters(), *network.buffers()]
    return frames, [value.detach().clone() for value in state], sent


@pytest.mark.slow("compiles networks with torch.compile")
@pytest.mark.parametrize("world_size", [NO_GROUP, 2])
def test_no_generation_compiles_anew_and_none_is_ignored(ranks: Ranks, world_size: int) -> None:
    """A mask is what a hook reads, never a requires_grad that a compiled graph has fixed."""
    eager = ranks(world_size, _run, False)
    outcomes = ranks.outcomes(world_size, _run, True)
    for outcome, (_, expected, expected_sent) in zip(outcomes, eager, strict=True):
        assert outcome.exitcode == 0, str(outcome)
        frames, weights, sent = outcome.value
        assert frames == [1, 1, 1, 1, 2]
        assert sent == expected_sent
        for weight, other in zip(weights, expected, strict=True):
            # Decomposed operations round otherwise in the last bits.
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6)


def _compiled_wrapper() -> None:
    model: Any = torch.compile(DistributedDataParallel(Residual()), backend="eager")
    optimizer = SGD(model.parameters(), lr=0.1)
    worm_dist.attach(model, optimizer, example_inputs=random_images(1))


def test_a_compiled_wrapper_is_refused_with_the_right_order(ranks: Ranks) -> None:
    for outcome in ranks.outcomes(2, _compiled_wrapper):
        assert outcome.error == "BackendError"
        assert "DistributedDataParallel(torch.compile(network))" in outcome.text
