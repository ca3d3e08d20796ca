"""Statistics that do not follow the batches stay as they are, to the bit: a draw estimates anew
what training estimates, and writes to nothing else."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from tests.settings import at_once
from worm_dist import Engine, WormConfig

pytestmark = pytest.mark.slow("trains with frozen statistics, ten seconds")

_DROPPED = (0, 3, 8)
_KEPT = {"bn1": [1, 2, 4, 5], "bn2": [0, 1, 3, 4, 5, 6, 7]}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _attached(network: nn.Module, example: Any, removes: bool = False) -> Engine:
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    truncation: dict[str, Any] = at_once(2) if removes else {"mode": "off"}
    return worm_dist.attach(
        model,
        SGD(network.parameters(), lr=0.01, momentum=0.9),
        WormConfig(truncation=truncation, search={"l1": 0.0}),
        example_inputs=example,
        steps_per_epoch=2,
    )


def _train(engine: Engine, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        engine.optimizer.zero_grad()
        engine.model(batch).square().mean().backward()
        engine.optimizer.step()


def _batches(number: int, samples: int = 6, first: int = 0) -> list[Tensor]:
    """Of this rank, far from what the statistics say."""
    return [
        random_images(samples, seed=10 * step + _rank()) * 3 + 1
        for step in range(first, first + number)
    ]


# ---- norms in eval mode --------------------------------------------------------------------------


def _frozen(norms: Sequence[str], samples: int, removes: bool) -> dict[str, Any]:
    """What a draw changes of statistics, modes and outputs, once channels are zero."""
    network = Plain()
    randomise(network, seed=3)  # as if they had been trained elsewhere
    for name in norms:
        network.get_submodule(name).eval()
    engine = _attached(network, random_images(1), removes)
    _train(engine, _batches(2, samples))
    mask = mask_dropping(engine.groups, *_DROPPED)
    if removes:
        engine.truncate(mask)
        for step in range(2):
            _train(engine, _batches(1, samples, first=2 + step))
            engine.check()
        _train(engine, _batches(1, samples, first=4))
    else:
        with torch.no_grad():
            for group in engine.groups:
                for norm in group.norms:
                    for name, _ in norm.parameters:
                        network.get_parameter(name)[~mask[group.name]] = 0
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = {name: (m.training, vars(m).get("momentum")) for name, m in network.named_modules()}
    images = random_images(4, seed=99)
    with torch.no_grad():
        before = copy.deepcopy(network)(images)
    engine.draw(mask)
    with torch.no_grad():
        after = copy.deepcopy(network)(images)
    return {
        "before": state,
        "after": {name: value.clone() for name, value in network.state_dict().items()},
        "modes are kept": modes
        == {name: (m.training, vars(m).get("momentum")) for name, m in network.named_modules()},
        "outputs": (before, after),
    }


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("removes", [False, True], ids=["", "truncated before"])
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("norms", [("bn1", "bn2"), ("bn1",), ()], ids="+".join)
def test_norms_in_eval_mode_keep_their_statistics(
    ranks: Ranks, norms: tuple[str, ...], samples: int, removes: bool, world: int
) -> None:
    """Batches of two images say less than what norms were frozen with; they were overwritten all
    the same, and with batches of one the draw ended halfway."""
    for found in ranks(world, _frozen, norms, samples, removes):
        assert found["modes are kept"]
        for name, kept in _KEPT.items():
            same = [
                torch.equal(
                    found["after"][f"{name}.{key}"],
                    found["before"][f"{name}.{key}"][kept],
                )
                for key in ("running_mean", "running_var")
            ]
            assert same == [name in norms] * 2, name
            counter = f"{name}.num_batches_tracked"
            assert torch.equal(found["after"][counter], found["before"][counter])
        if len(norms) == 2:
            torch.testing.assert_close(*found["outputs"], rtol=1e-5, atol=1e-5)


def _frozen_on(rank: int) -> dict[str, Tensor]:
    network = Plain()
    randomise(network, seed=3)
    if _rank() == rank:
        network.bn1.eval()
    engine = _attached(network, random_images(1))
    _train(engine, _batches(2))
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    return dict(network.state_dict())


def test_ranks_hold_the_same_whichever_of_them_freezes(ranks: Ranks) -> None:
    """A place in the sum for every norm, or ranks would add up what belongs to different ones."""
    one, other = ranks(2, _frozen_on, 1)
    for key, value in one.items():
        if "num_batches" not in key:
            assert torch.equal(value, other[key]), key


# ---- batches that some norms cannot be run with --------------------------------------------------


class _Pooling(nn.Module):
    """A branch that pools whole images, as in DeepLab: its norm sees one value for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.bn1(self.conv1(images)))
        pooled = self.bn2(self.conv2(features.mean((2, 3), keepdim=True))).relu()
        both = [self.bn3(self.conv3(features)).relu(), pooled.expand(-1, -1, 8, 8)]
        logits: Tensor = self.head(torch.cat(both, 1))
        return logits


def _pooled(frozen: tuple[str, ...]) -> tuple[list[bool], int, bool]:
    """Which norms have other statistics after a draw; width; whether training goes on."""
    network = _Pooling()
    randomise(network, seed=3)
    for name in frozen:
        network.get_submodule(name).eval()
    engine = _attached(network, random_images(1))
    _train(engine, _batches(3, samples=1))
    kept = {"bn1": slice(1, 6), "bn2": slice(0, 8), "bn3": slice(0, 8)}
    before = {name: network.get_buffer(f"{name}.running_var")[kept[name]].clone() for name in kept}
    engine.draw(mask_dropping(engine.groups, 0))
    changed = [
        not torch.equal(network.get_buffer(f"{name}.running_var"), value)
        for name, value in before.items()
    ]
    _train(engine, _batches(1, samples=1, first=7))
    return changed, network.conv1.out_channels, network.training


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("frozen", [("bn1", "bn2", "bn3"), ("bn2",)], ids="+".join)
def test_batches_of_one_image(ranks: Ranks, frozen: tuple[str, ...], world: int) -> None:
    """A norm of single values raises in training mode; it did so in the middle of a draw."""
    for changed, width, trains in ranks(world, _pooled, frozen):
        assert changed == [name not in frozen for name in ("bn1", "bn2", "bn3")]
        assert width == 5 and trains


def _with_last_batch(samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last batch of an epoch is small, and unlike the others."""
    network = Plain()
    engine = _attached(network, random_images(2))
    last = random_images(samples, seed=_rank() + 50) + 5
    _train(engine, [*_batches(3, samples=32), last])
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    own = torch.cat([*_batches(3, samples=32), last])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())] if _size() else [own]
    if _size():
        dist.all_gather(everyone, own)
    with torch.no_grad():
        values = copy.deepcopy(network.conv1).double()(torch.cat(everyone).double())
    return (
        network.get_buffer("bn1.running_mean"),
        network.get_buffer("bn1.running_var"),
        values.mean((0, 2, 3)).float(),
        values.var((0, 2, 3)).float(),
    )


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 0


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("samples", [1, 2, 31])
def test_a_small_last_batch_counts_for_as_much_as_it_holds(
    ranks: Ranks, samples: int, world: int
) -> None:
    """Two images of 98 counted for a quarter."""
    for mean, variance, true_mean, true_variance in ranks(world, _with_last_batch, samples):
        torch.testing.assert_close(mean, true_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(variance, true_variance, rtol=1e-5, atol=1e-5)


# ---- what else a forward pass writes to ----------------------------------------------------------


class _Writing(Residual):
    """A queue and its pointer, a running average that is assigned, and a random path."""

    queue: Tensor
    pointer: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(10, 12))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("average", torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        at = int(self.pointer)
        self.queue[:, at : at + 2] = logits[:2].detach().T
        self.pointer[0] = (at + 2) % 12
        self.average = 0.9 * self.average + 0.1 * logits.detach().mean(0)
        if self.training:
            logits = logits * (1 + 0.1 * random.random() + 0.1 * numpy.random.rand())
        return logits


def _random_states() -> dict[str, Any]:
    return {
        "Python's": random.getstate(),
        "numpy's": numpy.random.rand(3).tolist(),
        "torch's": torch.get_rng_state().tolist(),
    }


def _written(call: str) -> list[str]:
    """Buffers that a draw, or a check while channels leave, has changed besides statistics."""
    network = _Writing()
    engine = _attached(network, random_images(2), removes=True)
    _train(engine, _batches(3))
    mask = mask_dropping(engine.groups, 0, 9)
    if call == "check":
        engine.truncate(mask)
        _train(engine, _batches(2))
    numpy.random.seed(0)
    before = {name: value.clone() for name, value in network.named_buffers()}
    states = _random_states()
    numpy.random.seed(0)
    if call == "check":
        engine.check()
    else:
        engine.draw(mask)
    now = dict(network.named_buffers())
    assert now["bn1.running_mean"].tolist() != before["bn1.running_mean"].tolist()
    others = ("queue", "pointer", "average")
    changed = [name for name in others if not torch.equal(now[name], before[name])]
    return changed + [kind for kind, state in _random_states().items() if states[kind] != state]


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("call", ["draw", "check"])
def test_an_estimate_leaves_other_buffers_alone(ranks: Ranks, call: str, world: int) -> None:
    """The batches of the last steps went through its queue once more."""
    for changed in ranks(world, _written, call):
        assert changed == []
