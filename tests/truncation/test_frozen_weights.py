"""Frozen weights do what they are told, whatever the optimizer does.

Each test trains twice: with an engine, and in a loop written by hand that zeroes frozen gradients
and writes frozen weights itself, element by element.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import worm_dist
from tests.gradients import gradient
from tests.nets import Residual, random_images, randomise
from tests.oracles import live_flags, mask_dropping, zero_frozen
from tests.settings import at_once
from worm_dist import Engine, WormConfig

DROPPED = (0, 3, 4, 9, 12)  # three of the tied group's eight channels, two of the inner six
NUM_STEPS = 20

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "sgd-nesterov-foreach": lambda p: SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=True
    ),
    "sgd-nesterov-fused": lambda p: SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True
    ),
    "sgd-nesterov-loop": lambda p: SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=False
    ),
    "adam-foreach": lambda p: Adam(p, lr=0.01, weight_decay=0.01, foreach=True),
    "adam-fused": lambda p: Adam(p, lr=0.01, weight_decay=0.01, fused=True),
    "adam-amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw-foreach": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.005, momentum=0.9, weight_decay=0.01),
}


def _network() -> Residual:
    torch.manual_seed(0)
    network = Residual()
    randomise(network, seed=3)
    return network


def _attach(network: nn.Module, optimizer: Optimizer, **truncation: object) -> Engine:
    config = WormConfig(search={"l1": 0.01}, truncation=truncation)
    return worm_dist.attach(
        network, optimizer, config, example_inputs=random_images(1), steps_per_epoch=10
    )


def _backward(network: nn.Module, step: int, penalty: Tensor | float = 0.0) -> None:
    classes = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(network(random_images(16, seed=step)), classes)
    (loss + penalty).backward()


def _train(engine: Engine, steps: range, *, penalty: bool = False, clip: bool = False) -> None:
    for step in steps:
        engine.optimizer.zero_grad()
        _backward(engine.model, step, engine.penalty() if penalty else 0.0)
        if clip:
            nn.utils.clip_grad_norm_(engine.model.parameters(), 0.1)
        engine.optimizer.step()


def _values(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def _assert_equal(network: nn.Module, reference: nn.Module) -> None:
    expected = reference.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, expected[name]), name


def _flags(engine: Engine, *dropped: int) -> dict[str, Tensor]:
    frozen = ~mask_dropping(engine.groups, *dropped).keep
    return live_flags(engine.model, engine.groups, frozen, engine.config.truncation.scope)


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("scope", ["norm", "producer", "coupled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.fault(19, "every optimizer, momentum, decay, clipping")
def test_held_is_held_and_live_is_exact(name: str, scope: str, clip: bool) -> None:
    network, reference = _network(), _network()
    engine = _attach(
        network, OPTIMIZERS[name](list(network.parameters())), frozen_weights="hold", scope=scope
    )
    other = _attach(reference, SGD(reference.parameters()), frozen_weights="hold", scope=scope)
    flags = _flags(other, *DROPPED)
    other.detach()
    optimizer = OPTIMIZERS[name](list(reference.parameters()))
    for step in range(3):  # let momentum build up first
        optimizer.zero_grad()
        _backward(reference, step)
        optimizer.step()
    _train(engine, range(3))
    _assert_equal(network, reference)

    engine.truncate(mask_dropping(engine.groups, *DROPPED))
    start = _values(network)
    for step in range(3, 3 + NUM_STEPS):
        _train(engine, range(step, step + 1), clip=clip)
        optimizer.zero_grad()
        _backward(reference, step)
        zero_frozen(reference, flags)
        if clip:
            nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
        with torch.no_grad():
            for key, parameter in reference.named_parameters():
                parameter.copy_(torch.where(flags[key], parameter, start[key]))

    for key, parameter in network.named_parameters():
        frozen = ~flags[key]
        assert torch.equal(parameter[frozen], start[key][frozen]), key
    _assert_equal(network, reference)
    moved = [k for k, p in network.named_parameters() if not torch.equal(p, start[k])]
    assert len(moved) == len(start)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.fault(19, "the same while it fades")
def test_fade_reaches_exact_zero_in_equal_steps_while_filters_are_held(name: str) -> None:
    network, num_steps = _network(), 7
    engine = _attach(network, OPTIMIZERS[name](list(network.parameters())), **at_once(num_steps))
    _train(engine, range(3))
    engine.truncate(mask_dropping(engine.groups, *DROPPED))
    start, flags = _values(network), _flags(engine, *DROPPED)
    for step in range(1, NUM_STEPS + 1):
        _train(engine, range(step, step + 1))
        left = max(0, num_steps - step) / num_steps
        for key, parameter in network.named_parameters():
            frozen = ~flags[key]
            fades = key.startswith("bn")
            expected = start[key][frozen] * (torch.tensor(left) if fades else 1)
            assert torch.equal(parameter[frozen], expected), (key, step)
    assert not bool(network.bn0.weight[0]) and not bool(network.bn0.bias[0])


def test_a_fade_that_begins_later_ends_later() -> None:
    network = _network()
    engine = _attach(network, SGD(network.parameters(), lr=0.05), **at_once(4))
    engine.truncate(mask_dropping(engine.groups, 0))
    _train(engine, range(2))
    start = _values(network)
    engine.truncate(mask_dropping(engine.groups, 0, 3))
    assert engine.mask is not None
    _train(engine, range(2, 4))
    assert network.bn0.weight[0] == 0
    assert network.bn0.weight[3] == start["bn0.weight"][3] / 2
    _train(engine, range(4, 6))
    assert network.bn0.weight[3] == 0


def test_a_channel_whose_fade_has_begun_does_not_come_back() -> None:
    network = _network()
    engine = _attach(network, SGD(network.parameters(), lr=0.05), **at_once(4))
    engine.truncate(mask_dropping(engine.groups, 0, 3))
    _train(engine, range(1))
    before = engine.mask
    with pytest.raises(worm_dist.ConfigError, match=r"group stem: .*begun to leave"):
        engine.truncate(mask_dropping(engine.groups, 3))
    assert engine.mask == before
    with torch.no_grad():  # however good its score
        network.bn0.weight[0] = network.bn2.weight[0] = 100
    engine.check()
    mask = engine.mask
    assert mask is not None and not mask["stem"][0]


@pytest.mark.parametrize("name", ["sgd-nesterov-foreach", "adam-foreach", "adamw-fused"])
def test_a_thawed_channel_starts_with_zero_momentum_and_its_old_second_moment(name: str) -> None:
    network = _network()
    optimizer = OPTIMIZERS[name](list(network.parameters()))
    engine = _attach(network, optimizer, frozen_weights="hold")
    _train(engine, range(4))
    old = {key: copy.deepcopy(optimizer.state[p]) for key, p in network.named_parameters()}
    engine.truncate(mask_dropping(engine.groups, 0, 9))
    _train(engine, range(4, 10))
    engine.truncate(mask_dropping(engine.groups, 9))  # channel 0 thaws

    state = {key: optimizer.state[p] for key, p in network.named_parameters()}
    for key in ("stem.weight", "bn0.weight", "bn0.bias", "conv2.weight", "bn2.weight"):
        for moment, value in state[key].items():
            if moment in ("momentum_buffer", "exp_avg"):
                assert not value[0].any(), (key, moment)
                assert value[1].any(), (key, moment)
            elif moment == "exp_avg_sq":
                assert torch.equal(value[0], old[key][moment][0]), (key, moment)
                assert not torch.equal(value[1], old[key][moment][1]), (key, moment)

    still = network.bn1.weight[1].item()  # channel 9 is the inner group's second
    before = network.bn0.weight[0].item()
    _train(engine, range(10, 11))
    assert network.bn0.weight[0].item() != before
    assert network.bn1.weight[1].item() == still


def test_a_channel_frozen_before_the_first_step_is_held_too() -> None:
    """The optimizer has no state yet when the channel freezes."""
    network = _network()
    engine = _attach(
        network, OPTIMIZERS["adamw-foreach"](list(network.parameters())), frozen_weights="hold"
    )
    engine.truncate(mask_dropping(engine.groups, *DROPPED))
    start, flags = _values(network), _flags(engine, *DROPPED)
    _train(engine, range(5))
    for key, parameter in network.named_parameters():
        assert torch.equal(parameter[~flags[key]], start[key][~flags[key]]), key


@pytest.mark.parametrize("with_penalty", [False, True], ids=["", "penalty"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_free_moves_by_momentum_decay_and_penalty_alone(name: str, with_penalty: bool) -> None:
    network, reference = _network(), _network()
    engine = _attach(network, OPTIMIZERS[name](list(network.parameters())), frozen_weights="free")
    optimizer = OPTIMIZERS[name](list(reference.parameters()))
    scales: list[Tensor] = [reference.bn0.weight, reference.bn2.weight, reference.bn1.weight]
    engine.truncate(mask_dropping(engine.groups, *DROPPED))
    flags = _flags(engine, *DROPPED)
    for step in range(NUM_STEPS):
        _train(engine, range(step, step + 1), penalty=with_penalty)
        optimizer.zero_grad()
        penalty = 0.01 * torch.cat(scales).abs().sum() if with_penalty else 0.0
        _backward(reference, step, penalty)
        zero_frozen(reference, flags)
        if with_penalty:
            for key in ("bn0.weight", "bn1.weight", "bn2.weight"):
                scale, frozen = reference.get_parameter(key), ~flags[key]
                gradient(scale)[frozen] += 0.01 * scale.detach()[frozen].sign()
        optimizer.step()
    _assert_equal(network, reference)


def test_what_does_not_fade_needs_no_length_of_an_epoch() -> None:
    network = Residual()
    config = WormConfig(search={"every": "5ba"}, truncation={"frozen_weights": "hold"})
    optimizer = SGD(network.parameters(), lr=0.1)
    engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
    engine.truncate(mask_dropping(engine.groups, 1))
