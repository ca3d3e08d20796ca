"""The engine is called between a loop's tests: whatever mode of torch's is on then, it works as
without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.nets import Residual, gated, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from tests.settings import at_once
from worm_dist import Engine, WormConfig

pytestmark = pytest.mark.slow("trains in every context on real ranks")

_CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "bf16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
_CALLS = ["attach", "check", "truncate", "draw", "state"]
_RUNS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Optimizer]]] = {
    "remove": (Residual, at_once(2), SGD),
    "hold": (Residual, {"frozen_weights": "hold"}, AdamW),
    "soft": (Residual, {"mode": "soft"}, SGD),
    "gates": (gated, {"frozen_weights": "hold"}, AdamW),
}


class _Loop:
    """Calls of the engine's are made within a context.

    Args:
        run: which network, settings and optimizer.
        call: which call, or "all".
        context: which context.
    """

    def __init__(self, run: str, call: str, context: str) -> None:
        build, truncation, optimizer = _RUNS[run]
        torch.manual_seed(0)
        self.network = build()
        randomise(self.network, seed=3)
        self._call, self._context = call, context
        model = self.network
        if dist.is_initialized():
            model = DistributedDataParallel(self.network)
        self.optimizer = optimizer(self.network.parameters(), lr=0.01)  # type: ignore[call-arg]
        self._num_steps = 0
        with self._within("attach"):
            self.engine: Engine = worm_dist.attach(
                model,
                self.optimizer,
                WormConfig(truncation=truncation),
                example_inputs=random_images(2),
                steps_per_epoch=2,
            )

    def _within(self, call: str) -> AbstractContextManager[Any]:
        return _CONTEXTS[self._context if self._call in (call, "all") else ""]()

    def train(self) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        for _ in range(2):
            self.optimizer.zero_grad()
            images = random_images(6, seed=2 * self._num_steps + rank)
            loss = self.engine.model(images).square().mean() + self.engine.penalty()
            loss.backward()
            self.optimizer.step()
            self._num_steps += 1

    def run(self) -> dict[str, Tensor]:
        engine = self.engine
        mask = mask_dropping(engine.groups, 0, 2, 9)
        self.train()
        with self._within("check"):
            engine.check()
        with self._within("state"):
            engine.state_dict()
        with self._within("truncate"):
            engine.truncate(mask)
        self.train()
        with self._within("check"):
            engine.check()
        self.train()
        with self._within("draw"):
            engine.draw(mask)
        self.train()
        for tensor in (*self.network.parameters(), *self.network.buffers()):
            assert not tensor.is_inference()
        for moments in self.optimizer.state.values():
            assert not any(isinstance(v, Tensor) and v.is_inference() for v in moments.values())
        return {name: value.clone() for name, value in self.network.state_dict().items()}


def _ends(run: str, call: str, context: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return _Loop(run, call, "").run(), _Loop(run, call, context).run()


_CASES = [
    *((context, "all", run, NO_GROUP) for context in _CONTEXTS if context for run in _RUNS),
    *((context, "all", run, 2) for context in _CONTEXTS if context for run in ("remove", "hold")),
    *(("inference mode", call, "remove", NO_GROUP) for call in _CALLS),
]


@pytest.mark.parametrize(("context", "call", "run", "world"), _CASES)
def test_a_call_within_a_context_is_one_without(
    ranks: Ranks, call: str, context: str, run: str, world: int
) -> None:
    """What a draw made in inference mode could never be trained, and in mixed precision channels
    that can be drawn were found out not to be."""
    for expected, found in ranks(world, _ends, run, call, context):
        for name, value in expected.items():
            assert value.shape == found[name].shape, name
            assert torch.equal(value, found[name]), name
