from __future__ import annotations

from typing import Any

import pytest
import torch

from worm_dist.config import SearchConfig
from worm_dist.groups.gates import gated, gates_of
from worm_dist.models import build_model

TINY: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 6}


def test_heads_and_neurons_get_gates_and_no_output_changes() -> None:
    network = build_model("vit_small", 10, 1, TINY).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        before = network(images)
        assert torch.equal(gated(network, SearchConfig())(images), before)
    assert [len(gate.scale) for _, gate in gates_of(network)] == [2, 6]


def test_the_control_experiment_starts_from_the_same_network() -> None:
    network = gated(build_model("vit_small", 10, 1, TINY), SearchConfig(enabled=False))
    assert len(gates_of(network)) == 2


@pytest.mark.parametrize("score", ["norm_scale", "weight_norm"])
def test_a_score_that_counts_no_gates_needs_none(score: Any) -> None:
    network = gated(build_model("vit_small", 10, 1, TINY), SearchConfig(importance=score))
    assert gates_of(network) == []


@pytest.mark.parametrize("name", ["vgg_small", "resnet20", "mobilenet_v3_small"])
def test_convolutional_networks_stay_as_they_are(name: str) -> None:
    network = build_model(name, 10, 3)
    names = [name for name, _ in network.named_parameters()]
    gated(network, SearchConfig())
    assert [name for name, _ in network.named_parameters()] == names
