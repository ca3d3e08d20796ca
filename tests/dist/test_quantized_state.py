"""Optimizer state that is not elementwise floating point is refused by name, before it is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from worm_dist import BackendError, ConfigError, Engine, WormConfig


class Scaled(Tensor):
    """Looks like floats of the parameter's shape, and is bytes and scales inside."""


class Blockwise(Optimizer):
    """Keeps its momentum of each parameter's shape, but not in floats of their own.

    Args:
        kind: ``uint8``, of which blocks share a scale, or ``subclass``.
    """

    def __init__(self, parameters: Any, kind: str) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self._kind = kind

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            zeros = torch.zeros_like(parameter)
            state["state1"] = zeros.byte() if self._kind == "uint8" else zeros.as_subclass(Scaled)
            state["absmax1"] = torch.ones(1)
            parameter.sub_(parameter.grad, alpha=0.01)


class Adam8bit(SGD):
    """By name one of bitsandbytes'."""


def _attached(kind: str) -> tuple[Engine, Optimizer]:
    network = Plain()
    optimizer = Blockwise(network.parameters(), kind)
    settings = WormConfig(search={"every": "1ba"}, truncation={"frozen_weights": "hold"})
    return worm_dist.attach(
        network, optimizer, settings, example_inputs=random_images(1)
    ), optimizer


def _step(engine: Engine) -> None:
    (engine.model(random_images(4)).square().mean() + engine.penalty()).backward()
    engine.optimizer.step()


@pytest.mark.parametrize(
    ("kind", "said"), [("uint8", r"is quantized \(torch.uint8\)"), ("subclass", "is a Scaled")]
)
def test_it_is_refused_at_the_first_check_truncation_or_draw(kind: str, said: str) -> None:
    """A channel's part of it was held and cut, of which the scale is shared with others."""
    engine, _ = _attached(kind)
    _step(engine)
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    mask = mask_dropping(engine.groups, 0, 3)
    for where, call in (
        ("check at step 1", engine.check),
        ("truncate", lambda: engine.truncate(mask)),
        ("draw", lambda: engine.draw(mask)),
    ):
        text = f"{where}: the state 'state1' that Blockwise keeps of .*weight {said}"
        with pytest.raises(ConfigError, match=text):
            call()
    assert all(torch.equal(v, before[name]) for name, v in engine.model.state_dict().items())


def test_it_is_refused_at_attach_where_it_is_there_already() -> None:
    engine, optimizer = _attached("uint8")
    _step(engine)
    network = engine.detach()
    with pytest.raises(ConfigError, match="attach: the state 'state1' that Blockwise keeps of"):
        worm_dist.attach(network, optimizer, example_inputs=random_images(1))
    dense = WormConfig.preset("dense")
    worm_dist.attach(network, optimizer, dense, example_inputs=random_images(1))


def test_an_optimizer_of_eight_bits_is_refused_by_its_name() -> None:
    network = Plain()
    with pytest.raises(BackendError, match="attach: Adam8bit keeps quantized moments"):
        worm_dist.attach(
            network, Adam8bit(network.parameters(), lr=0.1), example_inputs=random_images(1)
        )
