"""Published masks may drop a whole layer; the ticket keeps its best channel, and says so."""

from __future__ import annotations

import pytest
import torch

from tests.papers.nets import build
from tests.papers.published import batch_norms, early_bird_mask
from worm_dist import WormConfig, attach


def test_a_ticket_keeps_the_best_channel_of_an_emptied_layer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = build("vgg", 0)
    norms = batch_norms(network)
    with torch.no_grad():
        for number, norm in enumerate(norms.values()):
            norm.weight.uniform_(0.5, 1) if number != 1 else norm.weight.uniform_(0, 0.1)
    config = WormConfig.preset("early-bird", search={"window": 1})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    engine = attach(network, optimizer, config, example_inputs=torch.zeros(1, 1, 8, 8))
    emptied = list(norms)[1]
    assert not bool(early_bird_mask(network, 0.5)[emptied].any())
    best = int(norms[emptied].weight.argmax())
    assert engine.is_due
    with caplog.at_level("WARNING"):
        verdict = engine.check()
    assert verdict.ticket and not verdict.elbow
    (record,) = engine.history
    # The candidates are the published ones all the same.
    assert not bool(record.mask[emptied].any()) and record.floored == ("features.3",)
    assert "drops all channels of features.3; one channel of each is kept" in caplog.text
    engine.draw()
    assert engine.mask is not None
    assert engine.mask["features.3"].nonzero().flatten().tolist() == [best]
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_floor_keeps_more() -> None:
    network = build("vgg", 0)
    with torch.no_grad():
        list(batch_norms(network).values())[1].weight.uniform_(0, 0.1)
    config = WormConfig.preset("early-bird", search={"min_keep_ratio": "1/4"})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    engine = attach(network, optimizer, config, example_inputs=torch.zeros(1, 1, 8, 8))
    engine.check()
    assert engine.mask is not None and int(engine.mask["features.3"].sum()) == 4
