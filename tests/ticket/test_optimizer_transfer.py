from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import StepLR

import worm_dist
from tests.nets import Flattening, Plain, Residual, random_images, randomise
from tests.oracles import mask_dropping
from worm_dist import Engine, WormConfig

DROPPED = (0, 3, 4, 9, 12)

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgd-plain": lambda p: SGD(p, lr=0.05),
    "adam-amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: Adagrad(p, lr=0.01),
}


def _attach(network: nn.Module, optimizer: Optimizer) -> Engine:
    config = WormConfig(truncation={"frozen_weights": "hold"}, ticket={"recalibrate_batches": 0})
    return worm_dist.attach(
        network, optimizer, config, example_inputs=random_images(1), steps_per_epoch=10
    )


def _train(model: nn.Module, optimizer: Optimizer, num_steps: int) -> None:
    for step in range(num_steps):
        optimizer.zero_grad()
        model(random_images(8, seed=step)).square().mean().backward()
        optimizer.step()


def _survivors(engine: Engine, dropped: tuple[int, ...]) -> dict[str, dict[int, Tensor]]:
    """For every parameter and dimension the indices that stay, found channel by channel."""
    network, first = engine.model, 0
    kept: dict[str, dict[int, list[int]]] = {}
    for group in engine.groups:
        for member in group.members:
            for name, dim in member.parameters:
                size = network.get_parameter(name).shape[dim]
                places = kept.setdefault(name, {}).setdefault(dim, list(range(size)))
                for channel in range(group.num_channels):
                    if first + channel in dropped:
                        for place in member.positions[channel].tolist():
                            places.remove(place)
        first += group.num_channels
    return {
        name: {dim: torch.tensor(places) for dim, places in along.items()}
        for name, along in kept.items()
    }


def _select(value: Any, shape: torch.Size, kept: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor) and value.shape == shape:
        for dim, places in kept.items():
            value = value.index_select(dim, places)
    return value


@pytest.mark.parametrize("build", [Residual, Flattening])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_state_of_every_survivor_are_carried_over_bit_for_bit(
    name: str, build: type[nn.Module]
) -> None:
    network = build()
    randomise(network, seed=1)
    optimizer = OPTIMIZERS[name](network.parameters())
    engine = _attach(network, optimizer)
    _train(network, optimizer, 4)
    kept = _survivors(engine, DROPPED)
    shapes = {key: p.shape for key, p in network.named_parameters()}
    weights = {key: p.detach().clone() for key, p in network.named_parameters()}
    state = {key: copy.deepcopy(optimizer.state.get(p)) for key, p in network.named_parameters()}

    engine.draw(mask_dropping(engine.groups, *DROPPED))

    assert engine.optimizer is optimizer
    for key, parameter in network.named_parameters():
        at = kept.get(key, {})
        assert torch.equal(parameter, _select(weights[key], shapes[key], at)), key
        assert (state[key] is None) == (parameter not in optimizer.state)
        for moment, value in (state[key] or {}).items():
            now = optimizer.state[parameter][moment]
            expected = _select(value, shapes[key], at)
            if isinstance(expected, Tensor):
                assert torch.equal(now, expected), (key, moment)
            else:
                assert now == expected, (key, moment)
    assert set(optimizer.state) <= set(network.parameters())
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(network.parameters())
    _train(network, optimizer, 2)


def test_parameter_groups_keep_their_settings_and_their_members() -> None:
    network = Residual()
    norms = [p for key, p in network.named_parameters() if key.startswith("bn")]
    others = [p for key, p in network.named_parameters() if not key.startswith("bn")]
    groups: list[dict[str, Any]] = [
        {"params": norms, "weight_decay": 0.0, "lr": 0.5},
        {"params": others},
    ]
    optimizer = SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1)
    engine = _attach(network, optimizer)
    _train(network, optimizer, 2)
    engine.draw(mask_dropping(engine.groups, *DROPPED))
    first, second = optimizer.param_groups
    assert (first["weight_decay"], first["lr"]) == (0.0, 0.5)
    assert (second["weight_decay"], second["lr"]) == (0.1, 0.05)
    for group, starts_with_bn in ((first, True), (second, False)):
        expected = [
            p for key, p in network.named_parameters() if key.startswith("bn") == starts_with_bn
        ]
        assert list(map(id, group["params"])) == list(map(id, expected))


def test_a_scheduler_goes_on() -> None:
    network = Residual()
    optimizer = SGD(network.parameters(), lr=1.0, momentum=0.9)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    engine = _attach(network, optimizer)
    _train(network, optimizer, 1)
    scheduler.step()
    engine.draw(mask_dropping(engine.groups, *DROPPED))
    before = network.head.bias.detach().clone()
    _train(network, optimizer, 1)
    scheduler.step()
    assert scheduler.get_last_lr() == [0.25] and optimizer.param_groups[0]["lr"] == 0.25
    assert not torch.equal(network.head.bias, before)


def test_parameters_that_are_not_in_the_optimizer_stay_out_of_it() -> None:
    network = Residual()
    network.head.requires_grad_(False)
    trained = [p for key, p in network.named_parameters() if not key.startswith("head")]
    optimizer = SGD(trained, lr=0.05, momentum=0.9)
    engine = _attach(network, optimizer)
    _train(network, optimizer, 2)
    head = network.head.weight.detach().clone()
    engine.draw(mask_dropping(engine.groups, 0, 3))
    assert torch.equal(network.head.weight, head[:, [1, 2, 4, 5, 6, 7]])
    in_optimizer = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert id(network.head.weight) not in in_optimizer
    assert network.head.weight not in optimizer.state
    assert len(in_optimizer) == len(trained)


def test_factored_optimizer_state_follows_too() -> None:
    """Adafactor keeps one number for each row and each column, not for each element."""
    network = Plain()
    optimizer = Adafactor(network.parameters(), lr=0.01)
    config = WormConfig(truncation={"mode": "off"})
    engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
    for step in range(3):
        optimizer.zero_grad()
        network(random_images(4, seed=step)).square().mean().backward()
        optimizer.step()
        if step == 1:
            engine.draw(mask_dropping(engine.groups, 0, 9))


def test_gradients_waiting_for_a_step_do_not_survive_a_draw_in_part() -> None:
    network = Residual()
    optimizer = SGD(network.parameters(), lr=0.1)
    engine = worm_dist.attach(network, optimizer, example_inputs=random_images(1))
    network(random_images(4)).sum().backward()
    engine.draw(mask_dropping(engine.groups, 0))
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_second_optimizer_is_refused() -> None:
    """It would go on with parameters that the draw has replaced: layers that never train again."""
    network = Residual()
    optimizer = SGD(network.head.parameters(), lr=0.1)
    with pytest.raises(worm_dist.ConfigError, match=r"does not have stem\.weight, which trains"):
        worm_dist.attach(network, optimizer, example_inputs=random_images(1))
    assert not network._forward_pre_hooks
