"""A step that is captured in a CUDA graph is repeated as it was: refused while channels leave."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.settings import at_once
from worm_dist import BackendError, Engine, WormConfig
from worm_dist.engine.capture_guard import CaptureGuard


def _step(engine: Engine) -> None:
    (engine.model(random_images(4)).square().mean() + engine.penalty()).backward()
    engine.optimizer.step()


def test_a_captured_step_is_refused_only_while_channels_are_frozen() -> None:
    """A fade stayed at the step of the capture for ever."""
    network = Plain()
    engine = worm_dist.attach(
        network,
        SGD(network.parameters(), lr=0.1),
        WormConfig(truncation=at_once(4)),
        example_inputs=random_images(1),
        steps_per_epoch=10,
    )
    (guard,) = (
        listener
        for listener in engine._training._step_hooks.listeners
        if isinstance(listener, CaptureGuard)
    )
    assert not guard._is_capturing()
    guard._is_capturing = lambda: True  # which only a GPU can
    _step(engine)
    mask = mask_dropping(engine.groups, 0, 3)
    engine.truncate(mask)
    before = [parameter.clone() for parameter in network.parameters()]
    with pytest.raises(BackendError, match="it is being captured in a CUDA graph"):
        _step(engine)
    assert all(map(torch.equal, before, network.parameters())) and engine.step == 1
    guard._is_capturing = lambda: False
    _step(engine)
    engine.draw(mask)
    guard._is_capturing = lambda: True
    _step(engine)
    assert engine.step == 3
