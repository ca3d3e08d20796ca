"""Mistakes in a loop of the user's own: one clear line at the first moment they can be known."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim import SGD, Optimizer

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import BackendError, ConfigError, Engine, WormConfig


class _Loop:
    """A network in training, an engine attached to it."""

    def __init__(self, steps_per_epoch: int | None = 2, **search: Any) -> None:
        torch.manual_seed(0)
        self.network = Plain()
        model: nn.Module = self.network
        if dist.is_initialized():
            model = DistributedDataParallel(self.network)
        self.optimizer: Optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.engine: Engine = worm_dist.attach(
            model,
            self.optimizer,
            WormConfig(search=search),
            example_inputs=random_images(1),
            steps_per_epoch=steps_per_epoch,
        )

    def train(self, num_steps: int, penalty: bool = True) -> None:
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            loss = self.engine.model(random_images(4)).square().mean()
            (loss + self.engine.penalty() if penalty else loss).backward()
            self.optimizer.step()


@pytest.mark.parametrize("steps_per_epoch", [None, 2])
def test_an_optimizer_that_was_made_anew_is_not_heard(steps_per_epoch: int | None) -> None:
    """No step was counted, nothing froze, and a draw left a network that never trained again."""
    loop = _Loop(steps_per_epoch)
    loop.train(2)
    loop.engine.check()
    loop.optimizer = SGD(loop.network.parameters(), lr=0.1)
    loop.train(1)
    with pytest.raises(ConfigError, match=r"no optimizer step has been counted since step 2.* SGD"):
        loop.engine.check()


def test_a_check_without_a_step_since_the_last_one() -> None:
    loop = _Loop(None)
    loop.engine.check()  # before the first step
    with pytest.raises(ConfigError, match="check: no optimizer step has been counted since step 0"):
        loop.engine.check()


def test_checks_between_micro_batches_are_none() -> None:
    loop = _Loop(8)
    loop.train(1)
    loop.engine.check()
    loop.network(random_images(2)).sum().backward()
    loop.engine.check()


def test_a_check_at_every_step_is_no_epoch() -> None:
    """``every: 1ep`` reads as if it throttled: the ticket was found at step 6."""
    loop = _Loop(None)
    loop.engine.check()
    loop.train(1)
    with pytest.raises(ConfigError, match=r"give attach\(steps_per_epoch=...\)"):
        loop.engine.check()


def test_with_the_length_of_an_epoch_it_throttles_itself() -> None:
    loop = _Loop(3)
    cut = []
    for _ in range(6):
        loop.train(1)
        cut.append(loop.engine.check().new_mask)
    assert cut == [False, False, True] * 2


def test_a_second_engine() -> None:
    loop = _Loop()
    again = SGD(loop.network.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="another engine is attached"):
        worm_dist.attach(loop.network, again, example_inputs=random_images(1))
    twin = copy.deepcopy(loop.network)
    worm_dist.attach(twin, SGD(twin.parameters(), lr=0.1), example_inputs=random_images(1))
    loop.engine.detach()
    worm_dist.attach(loop.network, again, example_inputs=random_images(1))


def test_after_a_ticket_the_next_search_may_begin() -> None:
    loop = _Loop()
    loop.engine.draw(mask_dropping(loop.engine.groups, 0))
    worm_dist.attach(loop.network, loop.optimizer, example_inputs=random_images(1))


def _replaced(network: Plain) -> None:
    network.conv1.weight = nn.Parameter(network.conv1.weight.detach().clone())


def _adapted(network: Plain) -> None:
    network.add_module("head", nn.Sequential(network.head, nn.Linear(10, 10)))


def _tied(network: Plain) -> None:
    network.conv1.bias = network.bn1.bias


_CHANGES: dict[str, Callable[[Plain], Any]] = {
    "replaced": _replaced,
    "adapted": _adapted,
    "tied": _tied,
    "normed": lambda network: parametrizations.weight_norm(network.conv2),
}


@pytest.mark.parametrize("what", ["check", "truncate", "draw"])
@pytest.mark.parametrize("name", _CHANGES)
def test_a_network_that_was_changed_after_attach(name: str, what: str) -> None:
    loop = _Loop()
    loop.train(2)
    _CHANGES[name](loop.network)
    mask = mask_dropping(loop.engine.groups, 0)
    with pytest.raises(ConfigError, match=f"{what}.*: parameter .* since attach"):
        loop.engine.check() if what == "check" else getattr(loop.engine, what)(mask)


@pytest.mark.parametrize("penalty", [True, False])
def test_a_loss_without_the_penalty_is_warned_of_once(
    penalty: bool, caplog: pytest.LogCaptureFixture
) -> None:
    loop = _Loop()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            loop.train(2, penalty)
            loop.engine.check()
    assert sum("engine.penalty()" in line for line in caplog.messages) == (not penalty)


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ([0.1], "with factor 0.1,"),
        ([10.0], "with factor 10,"),
        ([0.5, 0.25], "with factor 0.75,"),
        ([1.0], ""),
        ([0.25] * 4, ""),
        ([1.0] * 3, ""),
        ([0.0, 1.0], ""),
        ([65536.0], ""),
        ([1024.0, 1024.0], ""),
    ],
)
def test_a_penalty_that_is_scaled_is_warned_of_once(
    factors: list[float], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Scales were penalised by something else than the settings said.  Passes that share a step,
    and a loss scaler, are no mistake."""
    loop = _Loop()
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            loop.optimizer.zero_grad()
            for factor in factors:
                loss = loop.engine.model(random_images(4)).square().mean()
                (loss + factor * loop.engine.penalty()).backward()
            loop.optimizer.step()
            if loop.engine.step % 2 == 0:
                loop.engine.check()
    lines = [line for line in caplog.messages if "enters the loss" in line]
    assert len(lines) == bool(said)
    assert all(said in line for line in lines)


def test_no_penalty_is_missed_where_none_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    loop = _Loop(l1=0.0)
    loop.train(2, penalty=False)
    with caplog.at_level(logging.WARNING):
        loop.engine.check()
    assert not caplog.messages


def _hook_registered_late(what: str) -> str:
    loop = _Loop()
    loop.train(2)
    assert isinstance(loop.engine.model, DistributedDataParallel)
    loop.engine.model.register_comm_hook(None, fp16_compress_hook)
    loop.train(2)
    try:
        if what == "check":
            loop.engine.check()
        else:
            loop.engine.truncate(mask_dropping(loop.engine.groups, 0))
    except BackendError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("what", ["check", "truncate"])
def test_a_communication_hook_after_attach(ranks: Ranks, what: str) -> None:
    """torch's own error came days later, when the elbow was reached."""
    for said in ranks(2, _hook_registered_late, what):
        assert "a communication hook has been registered on the model since attach" in said


def test_a_hook_is_no_mistake_where_nothing_is_packed() -> None:
    loop = _Loop()
    loop.train(2)
    assert not loop.engine.check().ticket
