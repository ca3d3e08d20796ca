"""What trains changes: layers rest for a while and train again, one half of a GAN rests while the
other steps.  The ranks go on holding the same weights, those of plain DDP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.nets import random_images
from tests.oracles import live_flags
from tests.ranks import NO_GROUP, Ranks
from tests.settings import at_once
from worm_dist import Engine, Mask, WormConfig
from worm_dist.groups.channel_groups import Groups

pytestmark = pytest.mark.slow("trains layers that pause and go on, on real ranks")

_DROPPED = {"a": (0, 3, 5, 6), "b": (1, 2, 7)}
_HOLD: dict[str, Any] = {"frozen_weights": "hold"}


def _block(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class _Net(nn.Module):
    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        self.a, self.b, self.c = _block(3, 8), _block(8, 8), _block(8, 6)
        self.head = nn.Linear(6, outputs)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.c(self.b(self.a(images))).mean((2, 3)))
        return logits


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _wrapped(network: nn.Module, **arguments: Any) -> nn.Module:
    return DistributedDataParallel(network, **arguments) if dist.is_initialized() else network


def _mask(groups: Groups) -> Mask:
    keep = {name: torch.ones(size, dtype=torch.bool) for name, size in groups.sizes.items()}
    for name, dropped in _DROPPED.items():
        keep[f"{name}.0"][list(dropped)] = False
    return Mask(keep)


def _attached(model: nn.Module, optimizer: Optimizer, truncation: dict[str, Any]) -> Engine:
    return worm_dist.attach(
        model,
        optimizer,
        WormConfig(search={"l1": 0.0}, truncation=truncation, ticket={"recalibrate_batches": 0}),
        example_inputs=random_images(2),
        steps_per_epoch=3,
    )


def _step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    optimizer.zero_grad()
    model(random_images(6, seed=2 * number + _rank())).square().mean().backward()
    optimizer.step()


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


# ---- gradual unfreezing --------------------------------------------------------------------------

_RESTING: dict[str, Callable[[_Net], Sequence[nn.Module]]] = {
    "backbone": lambda network: [network.a, network.b],
    "first layer": lambda network: [network.a],
    "norms": lambda network: [network.a[1], network.b[1]],
    "dropped and a consumer": lambda network: [network.b, network.c],
}


def _set(parts: Sequence[nn.Module], trains: bool) -> None:
    for part in parts:
        part.requires_grad_(trains)


def _unfrozen(resting: str, optimizer_name: str, call: str, arguments: dict[str, Any]) -> Any:
    """A network after an engine's call in the middle of its rest, and one in a plain wrapper that
    has been made of the same weights while all of it trained."""
    torch.manual_seed(0)
    network, reference = _Net(), _Net()
    parts = _RESTING[resting](network)
    make: Callable[[nn.Module], Optimizer] = (
        (lambda n: SGD(n.parameters(), 0.05, momentum=0.9, weight_decay=0.01))
        if optimizer_name == "sgd"
        else lambda n: AdamW(n.parameters(), 0.01)
    )
    optimizer = make(network)
    engine = _attached(_wrapped(network, **arguments), optimizer, _HOLD)
    for number in range(3):
        _step(engine.model, optimizer, number)
    _set(parts, False)
    for number in range(3, 5):
        _step(engine.model, optimizer, number)
    mask = _mask(engine.groups)
    if call == "draw":
        engine.draw(mask)
        reference = _shrunk(network)
    else:
        engine.truncate(mask)
        reference.load_state_dict(network.state_dict())
    reference.requires_grad_(True)
    plain_model = _wrapped(reference, **arguments)
    plain = make(reference)
    _adopt(plain, reference, optimizer, network)
    both = [(engine.model, optimizer, network), (plain_model, plain, reference)]
    flags = {name: torch.ones_like(p, dtype=torch.bool) for name, p in network.named_parameters()}
    if call == "truncate":
        flags = live_flags(network, engine.groups, ~mask.keep, "producer")
    # Resting for a while longer, then all of it trains.
    _set(_RESTING[resting](reference), False)
    for number in range(5, 12):
        if number == 7:
            _set(parts, True)
            _set(_RESTING[resting](reference), True)
        for model, stepping, trained in both:
            stepping.zero_grad()
            model(random_images(6, seed=2 * number + _rank())).square().mean().backward()
            held = _state(trained)
            if trained is reference:
                for name, parameter in trained.named_parameters():
                    if parameter.grad is not None:
                        parameter.grad[~flags[name]] = 0
            stepping.step()
            if trained is reference:
                with torch.no_grad():
                    for name, parameter in trained.named_parameters():
                        parameter[~flags[name]] = held[name][~flags[name]]
    trains = [parameter.requires_grad for parameter in network.parameters()]
    return _with_gradients(network), _with_gradients(reference), all(trains)


def _with_gradients(network: nn.Module) -> dict[str, Tensor]:
    gradients = {
        f"gradient of {name}": parameter.grad.clone()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }
    return _state(network) | gradients


def _shrunk(network: _Net) -> _Net:
    """A network of the same shapes and weights, which has never been a larger one."""
    small = _Net()
    small.a, small.b, small.c = (
        _block(int(part[0].in_channels), int(part[0].out_channels))  # type: ignore[arg-type]
        for part in (network.a, network.b, network.c)
    )
    small.load_state_dict(network.state_dict())
    return small


def _adopt(
    plain: Optimizer, reference: nn.Module, optimizer: Optimizer, network: nn.Module
) -> None:
    for parameter, twin in zip(network.parameters(), reference.parameters(), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            plain.state[twin][key] = value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("call", ["draw", "truncate"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("resting", _RESTING)
def test_layers_that_rest_train_again_as_under_a_plain_wrapper(
    ranks: Ranks, resting: str, optimizer: str, call: str, world: int
) -> None:
    """The new wrapper left out what rested when it was made, and the truncation what rested when
    channels were frozen: ranks trained apart, and dropped filters trained on."""
    arguments = {"find_unused_parameters": True} if world else {}
    results = ranks(world, _unfrozen, resting, optimizer, call, arguments)
    for mine, plain, all_train in results:
        assert all_train
        for name, value in mine.items():
            assert torch.equal(value, plain[name]), name
            assert torch.equal(value, results[0][0][name]), name


def _unfrozen_while_channels_leave(all_rests: bool) -> tuple[dict[str, Tensor], bool, bool, str]:
    torch.manual_seed(0)
    network = _Net()
    optimizer = SGD(network.parameters(), 0.05, momentum=0.9)
    model = _wrapped(network, find_unused_parameters=True) if dist.is_initialized() else network
    engine = _attached(model, optimizer, at_once(2))
    parts = [network] if all_rests else [network.a, network.b]
    for number in range(2):
        _step(engine.model, optimizer, number)
    _set(parts, False)
    mask = _mask(engine.groups)
    engine.truncate(mask)
    if not all_rests:
        _step(engine.model, optimizer, 2)
    _set(parts, True)
    before = _state(network)
    for number in range(3, 7):
        _step(engine.model, optimizer, number)
    dropped = list(_DROPPED["a"])
    weight, scale, shift = (
        network.get_parameter(f"a.{name}") for name in ("0.weight", "1.weight", "1.bias")
    )
    is_held = torch.equal(weight[dropped], before["a.0.weight"][dropped])
    is_zero = not scale[dropped].any() and not shift[dropped].any()
    engine.check()
    engine.draw(mask)
    _step(engine.model, optimizer, 8)
    return _state(network), is_held, is_zero, engine.phase.value


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("all_rests", [False, True], ids=["backbone", "everything"])
def test_channels_that_leave_while_layers_rest(ranks: Ranks, all_rests: bool, world: int) -> None:
    """Where nothing trained at all, a share of nothing was divided by."""
    results = ranks(world, _unfrozen_while_channels_leave, all_rests)
    for state, is_held, is_zero, phase in results:
        assert is_held and is_zero and phase == "ticket"
        for name, value in state.items():
            assert torch.equal(value, results[0][0][name]), name


def _never_trained() -> tuple[dict[str, Tensor], bool]:
    """A layer that rests when the wrapper is made is never averaged, as under plain DDP."""
    torch.manual_seed(0)
    network = _Net()
    network.a.requires_grad_(False)
    optimizer = SGD([p for p in network.parameters() if p.requires_grad], 0.05, momentum=0.9)
    engine = _attached(_wrapped(network), optimizer, _HOLD)
    groups = engine.groups
    keep = {name: torch.ones(size, dtype=torch.bool) for name, size in groups.sizes.items()}
    keep["b.0"][[1, 2]] = False
    for number in range(2):
        _step(engine.model, optimizer, number)
    engine.truncate(Mask(keep))
    _step(engine.model, optimizer, 2)
    before = _state(network)
    engine.draw(Mask(keep))
    _step(engine.model, optimizer, 3)
    rests = not any(parameter.requires_grad for parameter in network.a.parameters())
    weight = network.get_parameter("a.0.weight")
    return _state(network), rests and torch.equal(weight, before["a.0.weight"])


@pytest.mark.parametrize("world", [NO_GROUP, 2])
def test_a_layer_that_never_trains_stays_out_of_it(ranks: Ranks, world: int) -> None:
    results = ranks(world, _never_trained)
    for state, is_left_alone in results:
        assert is_left_alone
        for name, value in state.items():
            assert torch.equal(value, results[0][0][name]), name


# ---- what is off around a call -------------------------------------------------------------------


def _off_around(call: str, optimizer_name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A loop that turns all gradients off for its test and on for its training, and one that does
    not; both call the engine between the two."""
    ends = []
    for turns in (True, False):
        torch.manual_seed(0)
        network = _Net()
        kinds: dict[str, Callable[..., Optimizer]] = {"sgd": SGD, "adamw": AdamW}
        optimizer = kinds[optimizer_name](network.parameters(), 0.01)
        engine = _attached(_wrapped(network), optimizer, at_once(2))
        mask = _mask(engine.groups)
        for epoch in range(3):
            network.requires_grad_(True)
            for number in range(3):
                _step(engine.model, optimizer, 3 * epoch + number)
            if turns:
                network.requires_grad_(False)
            if call == "check" or epoch != 1:
                engine.check()
            elif call == "truncate":
                engine.truncate(mask)
            else:
                engine.draw(mask)
            assert turns != any(parameter.requires_grad for parameter in network.parameters())
        ends.append(_state(network))
    return ends[0], ends[1]


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("call", ["check", "truncate", "draw"])
def test_gradients_that_are_off_during_a_call(
    ranks: Ranks, call: str, optimizer: str, world: int
) -> None:
    """DDP refuses a network of which nothing trains; what trains is asked when it steps."""
    for off, on in ranks(world, _off_around, call, optimizer):
        for name, value in off.items():
            assert torch.equal(value, on[name]), name


# ---- a GAN ---------------------------------------------------------------------------------------


class _Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = _block(3, 8), nn.Conv2d(8, 3, 1)

    def forward(self, noise: Tensor) -> Tensor:
        image: Tensor = self.out(self.a(noise))
        return image


class _Gan:
    """CycleGAN's habit: the discriminator rests while the generator steps, which is the last thing
    that an iteration does."""

    def __init__(self, truncation: dict[str, Any], attaches: bool = True) -> None:
        torch.manual_seed(0)
        arguments: dict[str, Any] = {"forward_sync_buffers": False} if dist.is_initialized() else {}
        self.network = _Net(outputs=1)
        self.judge = _wrapped(self.network, **arguments)
        self.generator = _wrapped(_Generator(), **arguments)
        self.optimizer: Optimizer = SGD(self.network.parameters(), 0.05, momentum=0.9)
        self.other = SGD(self.generator.parameters(), 0.05)
        self.engine = _attached(self.judge, self.optimizer, truncation) if attaches else None

    @property
    def model(self) -> nn.Module:
        return self.judge if self.engine is None else self.engine.model

    def iterate(self, number: int) -> None:
        real, noise = (random_images(4, seed=4 * number + 2 * _rank() + k) for k in (0, 1))
        fake = self.generator(noise)
        self.model.requires_grad_(True)
        self.optimizer.zero_grad()
        judged = self.model(fake.detach()).exp() + (-self.model(real)).exp()
        judged.mean().backward()
        self.optimizer.step()
        self.model.requires_grad_(False)
        self.other.zero_grad()
        (-self.model(fake)).exp().mean().backward()
        self.other.step()


def _adversarial(truncation: dict[str, Any], call: str) -> tuple[Any, ...]:
    gan = _Gan(truncation)
    assert gan.engine is not None
    for number in range(3):
        gan.iterate(number)
    mask = _mask(gan.engine.groups)
    getattr(gan.engine, call)(mask)
    if call == "truncate":
        first = _state(gan.network)["a.0.weight"]
        for number in range(3, 7):
            gan.iterate(number)
        dropped = list(_DROPPED["a"])
        assert torch.equal(gan.network.get_parameter("a.0.weight")[dropped], first[dropped])
        if dist.is_initialized():
            assert 0 < gan.engine.traffic.sent_bytes < gan.engine.traffic.dense_bytes
        gan.engine.draw(mask)
    assert not any(parameter.requires_grad for parameter in gan.network.parameters())
    before = _state(gan.network)
    for number in range(20, 23):
        gan.iterate(number)
    moved = all(not torch.equal(value, before[n]) for n, value in _state(gan.network).items())
    return _state(gan.network), _state(gan.generator), moved, gan.network.a[0].out_channels


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("call", ["draw", "truncate"])
@pytest.mark.parametrize("truncation", [_HOLD, at_once(2)], ids=["hold", "remove"])
def test_a_discriminator_at_rest_is_cut_and_trains_on(
    ranks: Ranks, truncation: dict[str, Any], call: str, world: int
) -> None:
    """A share of no trained element was divided by, and DDP refused to wrap what did not train."""
    results = ranks(world, _adversarial, truncation, call)
    for judge, generator, moved, width in results:
        assert moved and width == 4
        for mine, first in ((judge, results[0][0]), (generator, results[0][1])):
            for name, value in mine.items():
                assert torch.equal(value, first[name]), name


def _searching_adversarial() -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    gan, plain = _Gan(_HOLD), _Gan(_HOLD, attaches=False)
    assert gan.engine is not None
    for number in range(6):
        gan.iterate(number)
        plain.iterate(number)
        if number == 2:
            gan.engine.check()
    return _state(gan.network), _state(plain.network), gan.engine.mask is not None


@pytest.mark.parametrize("world", [NO_GROUP, 2])
def test_a_search_changes_nothing_of_a_gan(ranks: Ranks, world: int) -> None:
    for mine, plain, has_mask in ranks(world, _searching_adversarial):
        assert has_mask
        for name, value in mine.items():
            assert torch.equal(value, plain[name]), name
