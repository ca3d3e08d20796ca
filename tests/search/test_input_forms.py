"""Example inputs of every form in which networks take theirs; a wrong form is told with the right
one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from worm_dist import ConfigError, WormConfig


class _Taking(nn.Module):
    """A network behind whatever brings its images."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Plain()

    def forward(self, first: Any, second: Any = None) -> Tensor:
        if second is not None:
            first = first + second
        if isinstance(first, Mapping):
            first = first["images"]
        if isinstance(first, list):
            first = torch.stack(first)
        logits: Tensor = self.plain(first)
        return logits


_IMAGE = random_images(2)
_FORMS: Mapping[str, Any] = {
    "a tensor": _IMAGE,
    "two": (_IMAGE, _IMAGE),
    "two in a list": [_IMAGE, _IMAGE],
    "keywords": {"first": _IMAGE, "second": _IMAGE},
    "a list": ([_IMAGE[0], _IMAGE[1]],),
    "a dict": ({"images": _IMAGE},),
    "a list by keyword": {"first": [_IMAGE[0], _IMAGE[1]]},
}


@pytest.mark.parametrize("form", _FORMS)
def test_a_network_is_attached_to_and_drawn(form: str) -> None:
    network = _Taking()
    engine = worm_dist.attach(
        network,
        SGD(network.parameters(), lr=0.1),
        WormConfig(),
        example_inputs=_FORMS[form],
        steps_per_epoch=2,
    )
    engine.draw(mask_dropping(engine.groups, 0, 7))
    assert engine.model.get_parameter("plain.conv1.weight").shape[0] == 5


@pytest.mark.parametrize(
    ("inputs", "hint"),
    [
        ([random_images(1)[0]], r"one input that is a list is \(\[\.\.\.\],\)"),
        ({"images": random_images(1)}, r"one input that is a dict is \(\{\.\.\.\},\)"),
        (None, "does not run on the example inputs"),
        ("images", "does not run on the example inputs"),
    ],
)
def test_a_wrong_form_is_told_with_the_right_one(inputs: Any, hint: str) -> None:
    network = _Taking()
    optimizer = SGD(network.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=hint):
        worm_dist.attach(network, optimizer, example_inputs=inputs, steps_per_epoch=2)
