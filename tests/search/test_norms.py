"""Norms: channels are ranked by BatchNorm scales of any dimension, and by no other norm's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images, randomise
from tests.oracles import live_flags, mask_dropping
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import ConfigError, Engine, WormConfig

DROPPED = (0, 3, 7, 12)  # two of the first group's six channels, two of the second's eight
FADE_STEPS = 2


def _network(convolution: Any, norm: Any, pool: Any) -> nn.Sequential:
    return nn.Sequential(
        convolution(3, 6, 3, padding=1),
        norm(6),
        nn.ReLU(),
        convolution(6, 8, 3, padding=1),
        norm(8),
        nn.ReLU(),
        pool(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def _images(*sides: int, seed: int = 0) -> Tensor:
    return torch.randn(4, 3, *sides, generator=torch.Generator().manual_seed(seed))


def _attached(network: nn.Module, example: Tensor) -> Engine:
    randomise(network, seed=1)
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    config = WormConfig(truncation={**at_once(FADE_STEPS)}, ticket={"recalibrate_batches": 0})
    return worm_dist.attach(
        network, optimizer, config, example_inputs=example, steps_per_epoch=FADE_STEPS
    )


def _train(engine: Engine, inputs: Tensor, num_steps: int) -> None:
    for _ in range(num_steps):
        engine.optimizer.zero_grad()
        (engine.model(inputs).square().mean() + engine.penalty()).backward()
        engine.optimizer.step()


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )


DIMENSIONS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (_mlp, torch.randn(4, 5, generator=torch.Generator().manual_seed(0))),
    "1d": (lambda: _network(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d), _images(8)),
    "2d": (lambda: _network(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d), _images(8, 8)),
    "3d": (lambda: _network(nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d), _images(4, 4, 4)),
}


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_batch_norms_of_every_dimension_are_found_truncated_and_drawn(dimension: str) -> None:
    build, inputs = DIMENSIONS[dimension]
    network = build()
    engine = _attached(network, inputs[:1])
    assert [(g.name, g.num_channels) for g in engine.groups] == [("0", 6), ("3", 8)]
    assert engine.groups.dense == {}

    mask = mask_dropping(engine.groups, *DROPPED)
    producers = live_flags(network, engine.groups, ~mask.keep, "producer")
    norms = live_flags(network, engine.groups, ~mask.keep, "norm")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    engine.truncate(mask)
    _train(engine, inputs, FADE_STEPS + 1)
    for name, parameter in network.named_parameters():
        faded, held = ~norms[name], norms[name] & ~producers[name]
        assert not parameter[faded].any(), name
        assert torch.equal(parameter[held], before[name][held]), name
        assert not torch.equal(parameter, before[name]), name

    whole = copy.deepcopy(network).eval()
    engine.draw(mask)
    first, second = network.get_parameter("0.weight"), network.get_parameter("3.weight")
    assert (first.shape[0], second.shape[:2]) == (4, (6, 4))
    network.eval()
    torch.testing.assert_close(network(inputs), whole(inputs), rtol=1e-5, atol=1e-6)
    network.train()
    _train(engine, inputs, 2)
    assert all(bool(p.isfinite().all()) for p in network.parameters())


def _refusal(network: nn.Module, example: Tensor) -> str:
    with pytest.raises(ConfigError) as refusal:
        _attached(network, example)
    return str(refusal.value)


OTHERS: dict[str, Callable[[int], nn.Module]] = {
    "GroupNorm": lambda channels: nn.GroupNorm(2, channels),
    "InstanceNorm2d": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "LayerNorm": lambda channels: nn.LayerNorm([channels, 8, 8]),
}


@pytest.mark.parametrize("norm", OTHERS)
def test_a_network_without_any_batch_norm_is_refused(norm: str) -> None:
    network = _network(nn.Conv2d, OTHERS[norm], nn.AdaptiveAvgPool2d)
    assert "no channel group of which channels can be dropped" in _refusal(network, _images(8, 8))


@pytest.mark.parametrize("norm", OTHERS)
def test_the_refusal_names_the_norms_that_were_found_instead(norm: str) -> None:
    network = _network(nn.Conv2d, OTHERS[norm], nn.AdaptiveAvgPool2d)
    refusal = _refusal(network, _images(8, 8))
    for place in ("1", "4"):
        assert any(line.startswith(f"  {place}: ") and norm in line for line in refusal.split("\n"))


def _mixed(norm: Callable[[int], nn.Module]) -> nn.Module:
    """BatchNorm, another norm, BatchNorm."""
    network = _network(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
    other = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), norm(6), nn.ReLU())
    return nn.Sequential(*network[:3], other, *network[3:])


@pytest.mark.parametrize("norm", OTHERS)
def test_in_a_mixed_network_other_norms_stay_dense_and_the_rest_is_drawn(norm: str) -> None:
    network, images = _mixed(OTHERS[norm]), _images(8, 8)
    engine = _attached(network, images[:1])
    assert [group.name for group in engine.groups] == ["0", "4"]
    mask = mask_dropping(engine.groups, *DROPPED)
    engine.truncate(mask)
    _train(engine, images, FADE_STEPS + 1)
    whole = copy.deepcopy(network).eval()
    engine.draw(mask)
    network.eval()
    torch.testing.assert_close(network(images), whole(images), rtol=1e-5, atol=1e-6)
    assert network.get_parameter("3.1.weight").shape[0] == 6


@pytest.mark.parametrize("norm", OTHERS)
def test_dense_says_why_another_norm_is_in_no_group(norm: str) -> None:
    engine = _attached(_mixed(OTHERS[norm]), _images(8, 8))
    assert engine.groups.dense.keys() == {"3.1"}
    assert norm in engine.groups.dense["3.1"]


class _Tied(nn.Module):
    """A residual sum ties a BatchNorm's channels to another norm's; behind it a sound group."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.other = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.last, self.bn_last = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.bn(self.stem(images)))
        features = torch.relu(features + self.other(self.conv(features)))
        logits: Tensor = self.head(torch.relu(self.bn_last(self.last(features))).mean((2, 3)))
        return logits


@pytest.mark.parametrize("norm", OTHERS)
def test_a_batch_norm_tied_to_another_norm_stays_dense_with_the_reason(norm: str) -> None:
    engine = _attached(_Tied(OTHERS[norm]), _images(8, 8))
    assert [group.name for group in engine.groups] == ["last"]
    assert f"coupled with other ({norm})" in engine.groups.dense["bn"]


def _without_affine() -> nn.Module:
    network = _network(
        nn.Conv2d, lambda channels: nn.BatchNorm2d(channels, affine=False), nn.AdaptiveAvgPool2d
    )
    return network


def _with_frozen_scales() -> nn.Module:
    network = _network(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
    for name in ("1.weight", "4.weight"):
        network.get_parameter(name).requires_grad_(False)
    return network


@pytest.mark.parametrize("build", [_without_affine, _with_frozen_scales])
def test_scales_that_are_not_there_or_do_not_train_rank_nothing(
    build: Callable[[], nn.Module],
) -> None:
    refusal = _refusal(build(), _images(8, 8))
    for place in ("1", "4"):
        assert f"  {place}: {place} has no scale that trains" in refusal


def test_a_frozen_scale_leaves_its_group_dense_and_unchanged_by_the_draw() -> None:
    network, images = _network(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d), _images(8, 8)
    frozen = network.get_parameter("1.weight").requires_grad_(False)
    engine = _attached(network, images[:1])
    assert engine.groups.dense == {"1": "1 has no scale that trains"}
    scale = frozen.detach().clone()
    engine.truncate(mask_dropping(engine.groups, 0, 5))
    _train(engine, images, FADE_STEPS + 1)
    engine.draw(engine.mask)
    frozen = network.get_parameter("1.weight")
    assert torch.equal(frozen, scale) and not frozen.requires_grad
    assert network.get_parameter("3.weight").shape[:2] == (6, 6)


def test_norms_without_running_statistics_are_norms() -> None:
    network = _network(
        nn.Conv2d,
        lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
        nn.AdaptiveAvgPool2d,
    )
    images = _images(8, 8)
    engine = worm_dist.attach(
        network,
        SGD(network.parameters(), lr=0.05),
        WormConfig(truncation={**at_once(1)}),
        example_inputs=images[:1],
        steps_per_epoch=1,
    )
    mask = mask_dropping(engine.groups, *DROPPED)
    engine.truncate(mask)
    _train(engine, images, 2)
    whole = copy.deepcopy(network)
    engine.draw(mask)
    torch.testing.assert_close(network(images), whole(images), rtol=1e-5, atol=1e-6)


def test_synchronised_norms_train_and_are_drawn_in_one_process() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(
        _network(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d)
    )
    images = _images(8, 8)
    engine = _attached(network, images[:1])
    mask = mask_dropping(engine.groups, *DROPPED)
    engine.truncate(mask)
    _train(engine, images, FADE_STEPS + 1)
    engine.draw(mask)
    assert [type(network[place]).__name__ for place in (1, 4)] == ["SyncBatchNorm"] * 2
    assert [network[place].num_features for place in (1, 4)] == [4, 6]


def _wrap_synchronised_norms() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(Plain())
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(network)


def test_on_cpus_it_is_the_wrapper_that_refuses_synchronised_norms(ranks: Ranks) -> None:
    """In one line, before anything is attached."""
    ranks(2, _wrap_synchronised_norms)


def _with_a_group_of_its_own() -> list[bool]:
    group = dist.new_group([0])
    network = nn.SyncBatchNorm.convert_sync_batchnorm(Plain(), process_group=group)
    optimizer = SGD(network.parameters(), lr=0.1)
    engine = worm_dist.attach(network, optimizer, example_inputs=random_images(1))
    engine.draw(mask_dropping(engine.groups, *DROPPED))
    norms = [part for part in network.modules() if isinstance(part, nn.SyncBatchNorm)]
    return [norm.process_group is group for norm in norms]


def test_synchronised_norms_may_have_a_process_group(ranks: Ranks) -> None:
    """A process group cannot be pickled, and so not copied with the network: attach failed."""
    assert ranks(1, _with_a_group_of_its_own) == [[True, True]]
