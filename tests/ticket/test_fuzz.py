"""Tickets that were changed at random: a CheckpointError comes out, or a network, nothing else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

import worm_dist
from tests.mutations import fuzzed, other_bytes, other_json, other_tensors
from tests.nets import random_images
from worm_dist import CheckpointError, WormConfig, load_ticket
from worm_dist.models import build_model
from worm_dist.search.select import select_channels

_MODELS = {
    "vgg_small": {"widths": [8, 12]},
    "vit_small": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12},
}
_VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**20, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, ""),
    *("..", "/", "__class__", "features", "torchvision/vit_h_14", "os.system", "vgg_small"),
    *([], {}, [[]], [0], [0, 0], list(range(5000)), {"widths": 10**9}, {"num_layers": 10**9}),
]
_KEYS = ["", "widths", "num_layers", "image_size", "hidden_dim", "norm_layer", "weights", "kept"]


class _Ticket:
    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        _drawn(name).save_ticket(folder, model=_model(name))
        self.record = (folder / "ticket.json").read_bytes()
        self.weights = (folder / "ticket.safetensors").read_bytes()

    def load(self, record: bytes, weights: bytes) -> nn.Module | None:
        """The network; None if it is refused."""
        for name, content in (("ticket.json", record), ("ticket.safetensors", weights)):
            (self.folder / name).unlink()
            (self.folder / name).write_bytes(content)
        try:
            return load_ticket(self.folder)
        except CheckpointError as error:
            text = str(error)
        assert str(self.folder) in text
        assert len(text) < 2000
        return None


def _model(name: str) -> dict[str, Any]:
    return {"name": name, "num_classes": 10, "in_channels": 3, "arguments": _MODELS[name]}


def _drawn(name: str) -> worm_dist.Engine:
    torch.manual_seed(0)
    network = build_model(**_model(name))
    if name == "vit_small":
        worm_dist.add_gates(network)
    optimizer = SGD(network.parameters(), lr=0.05)
    config = WormConfig(truncation={"mode": "off"}, ticket={"round_to": 1})
    engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1, side=8))
    scores = torch.rand(sum(engine.groups.sizes.values()))
    engine.draw(select_channels(scores, engine.groups.sizes, 0.4, 0.1)[0])
    return engine


def _signed(record: bytes, weights: bytes) -> bytes:
    """As somebody would who wants it to be loaded."""
    try:
        content = json.loads(record)
        content["weights"] = {
            "size": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        content.pop("digest", None)
        text = json.dumps(content, sort_keys=True)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return record
    return json.dumps({**content, "digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


@pytest.fixture(scope="module", params=list(_MODELS))
def ticket(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> _Ticket:
    return _Ticket(tmp_path_factory.mktemp(request.param), request.param)


@settings(fuzzed, max_examples=200)
@given(data=st.data())
def test_other_records_that_are_signed(ticket: _Ticket, data: st.DataObject) -> None:
    record = data.draw(other_json(ticket.record, _VALUES, _KEYS) | other_bytes(ticket.record))
    ticket.load(_signed(record, ticket.weights), ticket.weights)


@settings(fuzzed, max_examples=100)
@given(data=st.data())
def test_other_records_that_are_not(ticket: _Ticket, data: st.DataObject) -> None:
    record = data.draw(other_json(ticket.record, _VALUES, _KEYS) | other_bytes(ticket.record))
    try:
        same = json.loads(record) == json.loads(ticket.record)
    except (ValueError, RecursionError):
        same = False
    network = ticket.load(record, ticket.weights)
    assert same or network is None


@settings(fuzzed, max_examples=150)
@given(data=st.data())
def test_other_weights_that_are_signed(ticket: _Ticket, data: st.DataObject) -> None:
    weights = data.draw(other_tensors(ticket.weights, _VALUES, _KEYS) | other_bytes(ticket.weights))
    ticket.load(_signed(ticket.record, weights), weights)


@settings(fuzzed, max_examples=50)
@given(data=st.data())
def test_other_weights_that_are_not(ticket: _Ticket, data: st.DataObject) -> None:
    weights = data.draw(other_bytes(ticket.weights))
    assert weights == ticket.weights or ticket.load(ticket.record, weights) is None
