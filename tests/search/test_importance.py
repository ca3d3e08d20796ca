from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.gradients import gradient
from tests.nets import Concatenating, Plain, Residual, random_images, randomise
from worm_dist.config import SearchConfig
from worm_dist.pruning.exactness import find_drawable_groups as find_groups
from worm_dist.search.importance import ChannelScales, LayerScales, WeightNorm
from worm_dist.search.select import select_channels


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
        assert torch.equal(gradient(norm.weight), norm.weight.sign())


def test_half_precision_scales_are_scored_in_single_precision() -> None:
    network = Concatenating()
    score = _scored(network)
    single = score()
    network.half()
    assert score().dtype == torch.float32
    assert torch.equal(_scored(network.float())(), single)


def test_of_coupled_norms_the_largest_may_count() -> None:
    network = Residual(width=8, inner=6)
    randomise(network, seed=1)
    score = ChannelScales(network, find_groups(network, random_images(1)), "max")
    tied = torch.maximum(network.bn0.weight.abs(), network.bn2.weight.abs())
    assert torch.equal(score(), torch.cat([tied, network.bn1.weight.abs()]))


class _Dense(nn.Module):
    """Two layers whose outputs, side by side, one norm normalises, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(10)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.conv1(images)
        second = self.conv2(torch.relu(self.bn1(first)))
        logits: Tensor = self.head(torch.relu(self.bn2(torch.cat([first, second], dim=1))))
        return logits


def test_a_norm_of_several_groups_is_penalised_once() -> None:
    """A norm behind a concatenation has a part in the group of every layer before it.  It was
    listed, and shrunk, once for each of them: in DenseNet up to twenty-four times as much."""
    network = _Dense()
    groups = find_groups(network, random_images(1))
    assert [len(group.norms) for group in groups] == [2, 1]
    score = ChannelScales(network, groups)
    assert score.penalty().item() == 4 + 10
    with torch.no_grad():
        network.bn2.weight.copy_(torch.arange(10.0))
    expected = torch.cat([(1 + torch.arange(4.0)) / 2, torch.arange(4.0, 10.0)])
    assert torch.equal(score(), expected)


def test_layer_by_layer_a_coupled_channel_goes_only_where_all_its_norms_drop_it() -> None:
    """Early-Bird's published rule, written out: one threshold over the scales of all norms,
    sorted[int(total * p)], and what is not above it is dropped, norm by norm."""
    network = Residual(width=8, inner=6)
    randomise(network, seed=4)
    groups = find_groups(network, random_images(1))
    score = LayerScales(network, groups)
    assert score.candidates.sizes == {"bn0": 8, "bn2": 8, "bn1": 6}
    candidates, _ = select_channels(score(), score.candidates.sizes, 0.5, floor=0)

    scales = {name: getattr(network, name).weight.detach().abs() for name in score.candidates.sizes}
    everything = torch.cat(list(scales.values()))
    threshold = everything.sort().values[int(len(everything) * 0.5) - 1]
    for name, size in scales.items():
        assert torch.equal(candidates[name], size > threshold), name
    mask = score.candidates.mask(candidates)
    assert torch.equal(mask["stem"], candidates["bn0"] | candidates["bn2"])
    assert torch.equal(mask["conv1"], candidates["bn1"])
    assert mask.num_kept > candidates.num_kept / 22 * 14  # so fewer channels go than p says


def test_channels_that_are_lost_are_lost_in_each_of_their_norms() -> None:
    network = Residual(width=8, inner=6)
    score = LayerScales(network, find_groups(network, random_images(1)))
    lost = torch.zeros(14, dtype=torch.bool)
    lost[[1, 9]] = True  # of the tied group, and of the inner one
    assert score.candidates.flags(lost).nonzero().flatten().tolist() == [1, 8 + 1, 16 + 1]


def test_without_norms_the_weights_that_make_a_channel_rank_it() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 2), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )
    search = SearchConfig(importance="weight_norm")
    groups = find_groups(network, random_images(1), search)
    first = network.get_parameter("0.weight").detach().flatten(1).norm(dim=1)
    second = network.get_parameter("2.weight").detach().transpose(0, 1).flatten(1).norm(dim=1)
    expected = torch.cat([first / first.mean(), second / second.mean()])
    score = WeightNorm(network, groups)
    torch.testing.assert_close(score(), expected, rtol=1e-6, atol=0)
    assert score.penalty().item() == 0
