"""After a fade the payload is the ticket's own size, and nothing else changes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.nets import Flattening, Residual, Separable, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import Engine, WormConfig
from worm_dist.backends.optimizer_view import Owners
from worm_dist.truncation.frozen_weights import Removed
from worm_dist.truncation.truncation import Truncation

pytestmark = pytest.mark.slow("trains until fades are over, on real ranks")

FADE_STEPS = 4
NETS = {"residual": Residual, "flattening": Flattening, "separable": Separable}


def _engine(net: str, optimizer: str, **wrapper: Any) -> Engine:
    torch.manual_seed(0)
    network: nn.Module = NETS[net]()
    randomise(network, seed=1)
    model = DistributedDataParallel(network, **wrapper)
    parameters = list(model.parameters())
    made: Optimizer = (
        SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
        if optimizer == "sgd"
        else AdamW(parameters, lr=0.01, weight_decay=0.1)
    )
    config = WormConfig(truncation={**at_once(FADE_STEPS)})
    engine = worm_dist.attach(model, made, config, example_inputs=random_images(1))
    engine.truncate(mask_dropping(engine.groups, 0, 2, 3, 9))
    return engine


def _train(engine: Engine, num_steps: int) -> list[int]:
    """Bytes sent in each step."""
    sent = []
    for _ in range(num_steps):
        # Dropout would draw other numbers on the two runs that are compared.
        torch.manual_seed(engine.step)
        images = random_images(4, seed=10 * engine.step + dist.get_rank())
        engine.optimizer.zero_grad()
        engine.model(images).square().mean().backward()
        engine.optimizer.step()
        sent.append(engine.traffic.sent_bytes)
    return sent


def _state(engine: Engine) -> dict[str, Any]:
    moments = engine.optimizer.state_dict()["state"]
    return copy.deepcopy({"weights": engine.model.state_dict(), "moments": moments})


def _with_and_without(net: str, optimizer: str, wrapper: dict[str, Any]) -> Any:
    engine = _engine(net, optimizer, **wrapper)
    sent = _train(engine, FADE_STEPS + 7)
    after_step, Truncation.after_step = Truncation.after_step, lambda *_: None  # type: ignore[method-assign]
    reference = _engine(net, optimizer, **wrapper)
    dense_columns = _train(reference, FADE_STEPS + 7)
    Truncation.after_step = after_step  # type: ignore[method-assign]
    state, expected = _state(engine), _state(reference)
    engine.draw(engine.mask)
    ticket = sum(p.numel() for p in engine.model.parameters())
    return sent, dense_columns, ticket, state, expected


@pytest.mark.parametrize("wrapper", [{}, {"bucket_cap_mb": 0.001}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("net", NETS)
def test_columns_of_faded_channels_leave_without_changing_a_bit(
    ranks: Ranks, net: str, optimizer: str, wrapper: dict[str, Any]
) -> None:
    for sent, dense_columns, ticket, state, expected in ranks(
        2, _with_and_without, net, optimizer, wrapper
    ):
        # The fade, one step to listen, then the ticket's own size.
        assert sent[: FADE_STEPS + 1] == dense_columns[: FADE_STEPS + 1]
        assert set(sent[FADE_STEPS + 1 :]) == {4 * ticket}
        assert 4 * ticket < dense_columns[-1]
        for name, weight in expected["weights"].items():
            assert torch.equal(state["weights"][name], weight), name
        for index, moments in expected["moments"].items():
            for key, moment in moments.items():
                if isinstance(moment, torch.Tensor):
                    assert torch.equal(state["moments"][index][key], moment), (index, key)


def _heard_on_rank_one() -> tuple[list[int], list[str]]:
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("worm_dist").addHandler(handler)
    if dist.get_rank() == 1:
        # What must not happen: a channel that counts as faded is still heard, on one rank alone.
        hold = Removed.hold

        def loud(self: Removed, step: int, owners: Owners) -> None:
            hold(self, step, owners)
            with torch.no_grad():
                network = engine.model.module
                assert isinstance(network, Residual)
                network.bn0.bias[0] = 0.5

        Removed.hold = loud  # type: ignore[method-assign]
    engine = _engine("residual", "sgd")
    return _train(engine, FADE_STEPS + 4), warnings


def test_what_one_rank_still_hears_stays_on_every_rank(ranks: Ranks) -> None:
    """Checked, not assumed: and the ranks must not pack differently because of it."""
    for sent, warnings in ranks(2, _heard_on_rank_one):
        assert len(set(sent)) == 1
        assert len(warnings) == 1 and "removed channels still reach" in warnings[0]
