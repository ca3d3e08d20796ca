"""EarlyBERT's masks (arXiv 2101.00063): a third of the heads of each layer, and two fifths of all
neurons, by signed coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from tests.papers.published import earlybert_masks
from worm_dist import Mask, WormConfig
from worm_dist.groups.gates import add_gates, gates_of
from worm_dist.groups.tracing import find_groups
from worm_dist.models.vit import vit_small
from worm_dist.search.ranking import Ranking

EARLYBERT = {
    "importance": "signed_gate",
    "selection": "quantile",
    "threshold": "global",
    "prune_ratio": 0.4,
    "ratios": {"*self_attention": "1/3"},
    "min_keep_ratio": 0.0,
    "window": 1,
}


def _network(num_heads: int) -> nn.Module:
    torch.manual_seed(0)
    return add_gates(vit_small(10, 1, num_layers=3, num_heads=num_heads, mlp_dim=40))


def _masks(network: nn.Module) -> Mask:
    config = WormConfig(search=EARLYBERT, truncation={"mode": "off"}, ticket={"round_to": 1})
    groups = find_groups(network, torch.zeros(1, 1, 8, 8))
    ranking = Ranking(config, network, groups, None)
    kept, _, _ = ranking.select(ranking.scores(), ranking.none_removed)
    return kept


def _compare(network: nn.Module) -> None:
    gates = [gate.scale.detach().numpy() for _, gate in gates_of(network)]
    heads, neurons = earlybert_masks(gates[::2], gates[1::2], 1 / 3, 0.4)
    kept = _masks(network)
    ours = {kind: [kept[name].numpy() for name in kept if kind in name] for kind in ("self", "mlp")}
    for kind, expected in (("self", heads), ("mlp", neurons)):
        assert len(ours[kind]) == len(expected) == 3
        for mine, theirs in zip(ours[kind], expected):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("num_heads", [4, 6, 12])
def test_masks_of_random_coefficients(num_heads: int) -> None:
    network = _network(num_heads)
    generator = torch.Generator().manual_seed(num_heads)
    for number in range(12):
        for _, gate in gates_of(network):
            gate.scale.data.normal_(generator=generator)
            if number % 3 == 2:  # ties
                gate.scale.data.mul_(4).round_().div_(4)
        _compare(network)


def test_a_third_of_twelve_heads_is_four() -> None:
    network = _network(12)
    for _, gate in gates_of(network):
        gate.scale.data.copy_(torch.linspace(-1, 1, gate.scale.numel()))
    kept = _masks(network)
    assert [int(kept[name].sum()) for name in kept if "self" in name] == [8, 8, 8]


def test_masks_of_trained_coefficients() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)[:256]
    classes = torch.tensor(digits.target)[:256]
    network = _network(6)
    gates = [gate for _, gate in gates_of(network)]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for batch in torch.arange(256).repeat(2).split(32):
        loss = nn.functional.cross_entropy(network(images[batch]), classes[batch])
        (loss + 1e-3 * sum(gate.scale.abs().sum() for gate in gates)).backward()
        optimizer.step()
        optimizer.zero_grad()
        _compare(network)
    # Signed: with magnitudes, heads below zero would be kept.
    with torch.no_grad():
        gates[0].scale.copy_(torch.tensor([-3.0, -2.0, 0.1, 0.2, 0.3, 0.4]))
    _compare(network)
    assert _masks(network)[next(iter(_masks(network)))].tolist() == [False] * 2 + [True] * 4
