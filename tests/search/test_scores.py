from __future__ import annotations

import pytest
import torch

from tests.nets import Concatenating, Plain, Residual, random_images, randomise
from worm_dist.search.scores import ChannelScales
from worm_dist.ticket.trial import find_drawable_groups as find_groups


def _scored(network: torch.nn.Module) -> ChannelScales:
    return ChannelScales(network, find_groups(network, random_images(1)))


def test_score_is_the_size_of_the_scale_in_the_order_of_the_groups() -> None:
    network = Plain()
    randomise(network, seed=1)
    with torch.no_grad():
        network.bn1.weight[2] *= -1
    expected = torch.cat([network.bn1.weight, network.bn2.weight]).abs()
    assert torch.equal(_scored(network)(), expected)


def test_coupled_norms_are_averaged() -> None:
    network = Residual(width=8, inner=6)
    randomise(network, seed=1)
    tied = (network.bn0.weight.abs() + network.bn2.weight.abs()) / 2
    expected = torch.cat([tied, network.bn1.weight.abs()])
    torch.testing.assert_close(_scored(network)(), expected.detach(), rtol=1e-6, atol=0)


def test_scores_follow_the_weights() -> None:
    network = Plain()
    score = _scored(network)
    with torch.no_grad():
        network.bn2.weight[3] = -7
    assert score()[6 + 3] == 7
    assert not score().requires_grad


def test_penalty_is_the_l1_norm_of_every_scale() -> None:
    network = Residual()
    randomise(network, seed=2)
    with torch.no_grad():
        network.bn1.weight[0] = -3
    penalty = _scored(network).penalty()
    norms = [network.bn0, network.bn1, network.bn2]
    assert penalty.shape == ()
    assert penalty.item() == pytest.approx(sum(n.weight.abs().sum().item() for n in norms))
    penalty.backward()
    for norm in norms:
        assert torch.equal(norm.weight.grad, norm.weight.sign())


def test_half_precision_scales_are_scored_in_single_precision() -> None:
    network = Concatenating()
    score = _scored(network)
    single = score()
    network.half()
    assert score().dtype == torch.float32
    assert torch.equal(_scored(network.float())(), single)
