"""What cannot be trained smaller is refused at attach, by its name, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim.lookahead import Lookahead
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import LBFGS, SGD, Adam, Optimizer

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import BackendError, WormError


class Sam(Optimizer):
    """Steps twice (arXiv 2010.01412), by way of another optimizer."""

    def __init__(self, parameters: Any, base: type[Optimizer], **settings: Any) -> None:
        super().__init__(parameters, {"rho": 0.05, **settings})
        self.base = base(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["old"])
        self.base.step()

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


class AcceleratedOptimizer(Optimizer):
    """As Hugging Face's wraps an optimizer: an optimizer by its class, with nothing of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class _Stepper:
    def step(self) -> None:
        """Steps something."""


_OPTIMIZERS: dict[str, tuple[Callable[[list[Tensor]], Any], str]] = {
    "Lookahead": (
        lambda ps: Lookahead(Adam(ps)),
        "Lookahead wraps the Adam in its attribute '_base_optimizer'",
    ),
    "Sam": (lambda ps: Sam(ps, SGD, lr=0.1), r"Sam wraps .* attach\(model, optimizer.base, ...\)"),
    "LBFGS": (LBFGS, "LBFGS keeps a history"),
    "none": (lambda ps: None, "give the optimizer"),
    "no optimizer": (lambda ps: _Stepper(), "_Stepper is not a torch optimizer"),
}


@pytest.mark.parametrize("name", _OPTIMIZERS)
def test_an_optimizer_of_which_too_little_is_seen(name: str) -> None:
    """Its steps were not heard, its state was not found: nothing froze, and what was drawn never
    trained again."""
    build, said = _OPTIMIZERS[name]
    network = Plain()
    with pytest.raises(WormError, match=said):
        worm_dist.attach(
            network, build(list(network.parameters())), example_inputs=random_images(1)
        )
    assert not network._forward_pre_hooks


def _steps(step: Callable[[], Any], network: nn.Module, optimizer: Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        network(random_images(4)).square().mean().backward()
        step()


def test_the_inner_optimizer_of_sam_is_heard() -> None:
    network = Plain()
    sam = Sam(network.parameters(), SGD, lr=0.01, momentum=0.9)
    engine = worm_dist.attach(network, sam.base, example_inputs=random_images(1))
    for expected in (1, 2):
        for step in (sam.first_step, sam.second_step):
            sam.zero_grad()
            network(random_images(4)).square().mean().backward()
            step()
        assert engine.step == expected
    engine.draw(mask_dropping(engine.groups, 0, 3))
    assert all(sam.base.state[p]["momentum_buffer"].shape == p.shape for p in network.parameters())


def test_behind_a_wrapper_that_adds_nothing_the_inner_optimizer_is_heard() -> None:
    network = Plain()
    inner = SGD(network.parameters(), lr=0.01, momentum=0.9)
    outer = AcceleratedOptimizer(inner)
    engine = worm_dist.attach(network, outer, example_inputs=random_images(1))
    assert engine.optimizer is outer
    _steps(outer.step, network, outer)
    assert engine.step == 3
    engine.draw(mask_dropping(engine.groups, 0, 3))
    assert engine.optimizer is outer
    before = [parameter.detach().clone() for parameter in network.parameters()]
    assert all(inner.state[p]["momentum_buffer"].shape == p.shape for p in network.parameters())
    _steps(outer.step, network, outer)
    assert not torch.equal(before[0], next(network.parameters()))


def _partly_sharded() -> nn.Module:
    network = Plain()
    fully_shard(network.conv1)
    return network


def _replicated() -> nn.Module:
    network = Plain()
    replicate(network)
    return network


_WRAPPERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FSDP2 in part": (_partly_sharded, "apply it to the whole network too"),
    "FSDP": (lambda: FullyShardedDataParallel(Plain(), device_id=torch.device("cpu")), "FSDP"),
    "replicate": (_replicated, "replicate"),
    "DataParallel": (lambda: nn.DataParallel(Plain()), "nn.DataParallel"),
}


def _refusal(name: str) -> str:
    network = _WRAPPERS[name][0]()
    try:
        worm_dist.attach(network, SGD(network.parameters(), 0.1), example_inputs=random_images(1))
    except BackendError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", _WRAPPERS)
def test_another_way_to_be_parallel(ranks: Ranks, name: str) -> None:
    """They were taken for bare networks, and told to be wrapped."""
    for said in ranks(2, _refusal, name):
        assert _WRAPPERS[name][1] in said and "not supported" in said


def test_data_parallel_on_one_process() -> None:
    assert "nn.DataParallel" in _refusal("DataParallel")
