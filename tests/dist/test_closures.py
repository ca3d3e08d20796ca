"""Optimizer steps with a closure that computes the gradients, as Lightning takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.settings import at_once
from worm_dist import WormConfig


def _trained(truncation: dict[str, Any], how: str) -> list[Tensor]:
    torch.manual_seed(0)
    network = Plain()
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    config = WormConfig(search={"l1": 0.05}, truncation={**at_once(3), **truncation})
    engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
    for step in range(6):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = network(random_images(4, seed=step)).square().mean()
            (loss + engine.penalty()).backward()
            return loss

        if step == 2:
            engine.truncate(mask_dropping(engine.groups, 0))
        if how == "none":
            closure()
            optimizer.step()
        elif how == "positional":
            assert optimizer.step(closure) is not None
        else:
            assert optimizer.step(closure=closure) is not None
    assert engine.step == 6
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("frozen_weights", ["free", "hold", "remove"])
def test_a_closure_changes_nothing(frozen_weights: str, how: str) -> None:
    """What acts before a step acted before the closure: the penalty that ``free`` adds to frozen
    gradients was lost."""
    truncation = {"frozen_weights": frozen_weights}
    for one, other in zip(_trained(truncation, "none"), _trained(truncation, how), strict=True):
        assert torch.equal(one, other)
