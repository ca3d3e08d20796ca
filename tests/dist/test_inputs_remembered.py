"""Inputs that the engine remembers, and what it estimates from them at a draw, whatever a loop or a
network does to its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from worm_dist import Engine, WormConfig

pytestmark = pytest.mark.slow("trains on every form of inputs on real ranks")

_DROPPED = (0, 3, 8)
_REMEMBERED = 8
_Feed = Callable[[Tensor], Tensor]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _attached(network: nn.Module, **changes: Any) -> Engine:
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    return worm_dist.attach(
        model,
        SGD(network.parameters(), lr=0.01, momentum=0.9),
        WormConfig(**{"truncation": {"mode": "off"}, "search": {"l1": 0.0}, **changes}),
        example_inputs=random_images(2),
        steps_per_epoch=100,
    )


def _batch(step: int, rank: int, samples: int = 6) -> Tensor:
    """Each from another distribution, so that a wrong one would show."""
    return random_images(samples, seed=step * 10 + rank) * (1 + rank) + step


def _step(engine: Engine, *inputs: Any, **keywords: Any) -> None:
    engine.optimizer.zero_grad()
    engine.model(*inputs, **keywords).square().mean().backward()
    engine.optimizer.step()


def _true(network: nn.Module, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of what the first convolution puts out."""
    with torch.no_grad():
        values = network.get_submodule("conv1").double()(torch.cat(list(batches)).double())
        network.float()
    return values.mean((0, 2, 3)).float(), values.var((0, 2, 3)).float()


# ---- where batches lie ---------------------------------------------------------------------------


def _fresh() -> _Feed:
    return lambda batch: batch


def _one_buffer() -> _Feed:
    buffer = torch.empty(0)
    return lambda batch: buffer.resize_(batch.shape).copy_(batch)


def _two_buffers() -> _Feed:
    buffers = [torch.empty(6, 3, 8, 8), torch.empty(6, 3, 8, 8)]

    def feed(batch: Tensor) -> Tensor:
        buffers.reverse()
        return buffers[0].copy_(batch)

    return feed


def _part_of_a_buffer() -> _Feed:
    buffer = torch.empty(64, 3, 8, 8)
    return lambda batch: buffer[: len(batch)].copy_(batch)


def _from_numpy() -> _Feed:
    """torch does not hear of what numpy writes."""
    array = torch.empty(6, 3, 8, 8).numpy()

    def feed(batch: Tensor) -> Tensor:
        array[:] = batch.numpy()
        return torch.from_numpy(array)

    return feed


def _two_from_numpy() -> _Feed:
    feeds = [_from_numpy(), _from_numpy()]

    def feed(batch: Tensor) -> Tensor:
        feeds.reverse()
        return feeds[0](batch)

    return feed


def _by_data() -> _Feed:
    """Nor of what is written past its graph."""
    buffer = torch.empty(6, 3, 8, 8)

    def feed(batch: Tensor) -> Tensor:
        buffer.data.copy_(batch)
        return buffer

    return feed


def _made_in_inference_mode() -> _Feed:
    with torch.inference_mode():
        buffer = torch.empty(6, 3, 8, 8)

    def feed(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return buffer.copy_(batch)

    return feed


_FEEDS: dict[str, Callable[[], _Feed]] = {
    "fresh": _fresh,
    "one buffer": _one_buffer,
    "two buffers": _two_buffers,
    "part of a buffer": _part_of_a_buffer,
    "numpy": _from_numpy,
    "two of numpy": _two_from_numpy,
    "data": _by_data,
    "inference mode": _made_in_inference_mode,
}


class _Shifting(Plain):
    """Computes with what it is given before a layer reads it, so that any tensor will do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + 0)


def _estimated(feed_name: str, num_steps: int, validates: bool) -> tuple[dict[str, Tensor], Any]:
    """The network after a draw; mean and variance of its first norm beside the true ones, over the
    newest batches and over all of those but the first."""
    network, feed = _Shifting(), _FEEDS[feed_name]()
    engine = _attached(network)
    for step in range(num_steps):
        _step(engine, feed(_batch(step, _rank())))
    if validates:  # by way of the same buffer
        network.eval()
        with torch.no_grad():
            engine.model(feed(torch.zeros(6, 3, 8, 8)))
        network.train()
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    trues = []
    for num_lost in (0, 1, 2):
        steps = range(max(0, num_steps - _REMEMBERED, num_lost), num_steps)
        batches = [_batch(step, rank) for step in steps for rank in range(_size())]
        trues.append(_true(network, batches))
    return state, trues


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("name", _FEEDS)
def test_batches_may_lie_where_others_lay(ranks: Ranks, name: str, world: int) -> None:
    """All that was remembered were as many names of the newest batch, and statistics were off by
    whole units."""
    results = ranks(world, _estimated, name, 11, False)
    for state, ((mean, variance), *_) in results:
        torch.testing.assert_close(state["bn1.running_mean"], mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state["bn1.running_var"], variance, rtol=1e-5, atol=1e-5)
        for key, value in state.items():
            assert torch.equal(value, results[0][0][key]), key


@pytest.mark.parametrize("name", _FEEDS)
def test_a_few_batches_are_enough_to_notice(name: str) -> None:
    """The first ones are lost if others have been written over them; none counts twice."""
    state, trues = _estimated(name, 4, False)
    assert any(
        torch.allclose(state["bn1.running_mean"], mean, atol=1e-5)
        and torch.allclose(state["bn1.running_var"], variance, rtol=1e-5)
        for mean, variance in trues
    )


@pytest.mark.parametrize("name", ["fresh", "one buffer", "part of a buffer", "inference mode"])
def test_what_is_validated_with_is_not_trained_with(name: str) -> None:
    """A validation wrote zeros where the batches of the training were thought to be."""
    state, ((mean, variance), *_) = _estimated(name, 11, True)
    torch.testing.assert_close(state["bn1.running_mean"], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state["bn1.running_var"], variance, rtol=1e-5, atol=1e-5)


def test_an_example_may_be_written_over() -> None:
    """A draw is rehearsed on the example, whatever lies where it lay."""
    network, example = Plain(), random_images(2)
    engine = worm_dist.attach(
        network, SGD(network.parameters(), lr=0.01), example_inputs=(example,)
    )
    example.fill_(float("nan"))
    example.resize_(0)
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    assert network.conv1.out_channels == 4


def _resumed(name: str, breaks_off: bool) -> dict[str, Tensor]:
    """The network after a draw shortly after step 12, where the run may have been broken off."""
    torch.manual_seed(0)
    network, feed = _Shifting(), _FEEDS[name]()
    engine = _attached(network)
    for step in range(15):
        if breaks_off and step == 12:
            states = network.state_dict(), engine.optimizer.state_dict(), engine.state_dict()
            network = _Shifting()
            engine = _attached(network)
            network.load_state_dict(states[0])
            engine.optimizer.load_state_dict(states[1])
            engine.load_state_dict(states[2])
        _step(engine, feed(_batch(step, _rank())))
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    return dict(network.state_dict())


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("name", ["fresh", "one buffer", "two buffers", "numpy"])
def test_a_resumed_run_remembers_the_same(ranks: Ranks, name: str, world: int) -> None:
    """It found out anew that its batches lay in one buffer, and lost one of them."""
    whole, resumed = (ranks(world, _resumed, name, breaks_off) for breaks_off in (False, True))
    for expected, found in zip(whole, resumed, strict=True):
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key


class _Nested(Plain):
    """Takes its images in a dict, in a list."""

    def forward(self, given: Any, *, scale: Tensor | None = None) -> Tensor:
        images = given["pictures"][0] if isinstance(given, dict) else given
        return super().forward(images if scale is None else images * scale)


@pytest.mark.parametrize("by", ["dict", "keyword"])
def test_buffers_are_found_within_what_is_given(by: str) -> None:
    network, feed, again = _Nested(), _one_buffer(), _from_numpy()
    engine = _attached(network)
    batches = [_batch(step, 0) for step in range(11)]
    for batch in batches:
        if by == "dict":
            _step(engine, {"pictures": [feed(batch)], "name": "a batch"})
        else:
            _step(engine, torch.ones(6, 3, 8, 8), scale=again(batch))
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    mean, variance = _true(network, batches[-_REMEMBERED:])
    torch.testing.assert_close(network.bn1.running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.bn1.running_var, variance, rtol=1e-5, atol=1e-5)


# ---- what the network does to them ---------------------------------------------------------------


class _Normalising(Plain):
    """Pixels from 0 to 255 become numbers around 0."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, images: Tensor) -> Tensor:
        if self.in_place:
            return super().forward(images.sub_(100).div_(50))
        return super().forward((images - 100) / 50)


def _normalised(in_place: bool, num_steps: int) -> dict[str, Tensor]:
    network = _Normalising(in_place)
    engine = _attached(network)
    for step in range(num_steps):
        _step(engine, _batch(step, _rank()) * 20 + 100)
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    return dict(network.state_dict())


@pytest.mark.parametrize("world", [NO_GROUP, 2])
def test_a_network_may_normalise_its_inputs_in_place(ranks: Ranks, world: int) -> None:
    """What it was given was normalised once more for every estimate, and statistics were off by a
    third."""
    for num_steps in (11, 1):
        for state, expected in zip(
            ranks(world, _normalised, True, num_steps), ranks(world, _normalised, False, num_steps)
        ):
            for name, value in expected.items():
                lost = num_steps == 1 and "bn" in name
                assert lost or torch.equal(state[name], value), name


# ---- what the network wants ----------------------------------------------------------------------


class _Detecting(nn.Module):
    """Puts out its loss in training, and insists on targets then and on none in a test.

    Args:
        asks: the module whose mode decides: the network itself, or a part of it.
    """

    def __init__(self, asks: str = "network") -> None:
        super().__init__()
        self.asks = asks
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 10))

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        features = torch.relu(self.bn1(self.conv1(images)))
        features = torch.relu(self.bn2(self.conv2(features)))
        logits: Tensor = self.head(features.mean((2, 3)))
        asked = {"network": self, "head": self.head, "dropout": self.head[0]}[self.asks]
        if asked.training:
            return nn.functional.cross_entropy(logits, targets)  # type: ignore[arg-type]
        assert targets is None, "targets are for training"
        return logits


def _modes(network: nn.Module) -> dict[str, tuple[bool, Any]]:
    return {
        name: (module.training, getattr(module, "momentum", None))
        for name, module in network.named_modules()
    }


def _says(asks: str, removes: bool) -> tuple[bool, bool]:
    """Whether statistics are those of the batches, and modes and random states what they were."""
    network = _Detecting(asks).eval()
    engine = _attached(network, truncation={} if removes else {"mode": "off"})
    network.train()
    batches = []
    for step in range(3):
        _step(engine, _batch(step, _rank()), torch.arange(6))
        batches += [_batch(step, rank) for rank in range(_size())]
    mask = mask_dropping(engine.groups, *_DROPPED)
    if removes:
        engine.truncate(mask)
    modes, random = _modes(network), torch.get_rng_state()
    engine.draw(mask)
    is_same = _modes(network) == modes and torch.equal(torch.get_rng_state(), random)
    mean, variance = (network.get_buffer(f"bn1.running_{what}").clone() for what in ("mean", "var"))
    true_mean, true_variance = _true(network, batches)
    is_estimated = torch.allclose(mean, true_mean, atol=1e-5)
    is_estimated &= torch.allclose(variance, true_variance, rtol=1e-4)
    _step(engine, _batch(4, _rank()), torch.arange(6))
    network.eval()
    with torch.no_grad():
        assert network(random_images(2)).shape == (2, 10)
    return is_estimated, is_same


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("removes", [False, True], ids=["", "truncated before"])
@pytest.mark.parametrize("asks", ["network", "head"])
def test_targets_may_be_for_training_only(
    ranks: Ranks, asks: str, removes: bool, world: int
) -> None:
    """The draw ended in a TypeError, with the network cut, its phase the old one and the momenta of
    its norms one."""
    for is_estimated, is_same in ranks(world, _says, asks, removes):
        assert is_estimated and is_same


@pytest.mark.parametrize("world", [NO_GROUP, 2])
def test_a_network_that_runs_only_as_it_trains_keeps_its_statistics(
    ranks: Ranks, world: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its dropout wants targets, and stays off while statistics are estimated."""
    for is_estimated, is_same in ranks(world, _says, "dropout", False):
        assert not is_estimated and is_same
    if world == NO_GROUP:
        _says("dropout", False)
        assert "BatchNorm statistics of 2 norms could not be estimated anew" in caplog.text
        assert "targets are for training" in caplog.text


def test_an_input_is_remembered_without_its_graph() -> None:
    """The graph of whatever had computed it stayed in memory, with all activations in it."""
    network = Plain()
    engine = worm_dist.attach(
        network, SGD(network.parameters(), lr=0.1), example_inputs=random_images(1)
    )
    network(random_images(2).requires_grad_() * 2)
    (call,) = engine._training.inputs.calls
    assert call.positional[0].grad_fn is None and not call.positional[0].requires_grad
