"""Misuse of attach, truncate and draw: one clear line, nothing changed, on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import ConfigError, Engine, Mask, WormConfig


def _attached() -> Engine:
    torch.manual_seed(0)
    network = Plain()
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    engine = worm_dist.attach(
        model,
        optimizer,
        WormConfig(search={"every": "1ba"}, truncation={"frozen_weights": "hold"}),
        example_inputs=random_images(1),
    )
    (engine.model(random_images(4)).square().mean() + engine.penalty()).backward()
    optimizer.step()
    return engine


def _as_dict(engine: Engine) -> dict[str, torch.Tensor]:
    return dict(mask_dropping(engine.groups, 0, 3))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return _attached()


@pytest.fixture(autouse=True)
def _unchanged(engine: Engine) -> Any:
    before = copy.deepcopy(engine.model.state_dict())
    yield
    assert all(
        torch.equal(value, before[name]) for name, value in engine.model.state_dict().items()
    )
    assert engine.phase == "search" and engine.mask is None


@pytest.mark.fault(49, "a mask that is a dict, a tensor or nothing")
@pytest.mark.parametrize("method", ["truncate", "draw"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (_as_dict, r"the mask is a dict; give worm_dist.Mask\(mask\), of bool\[channels\] for"),
        (lambda engine: torch.ones(14) > 0, "the mask is a Tensor; give worm_dist.Mask, of"),
        (lambda engine: 0.5, "the mask is a float; give"),
    ],
)
def test_what_is_no_mask_is_refused(
    engine: Engine, method: str, wrong: Callable[[Engine], Any], said: str
) -> None:
    """A dict, as the documentation writes masks, ended in AttributeError."""
    with pytest.raises(ConfigError, match=f"^{method} at step 1: {said}"):
        getattr(engine, method)(wrong(engine))


def test_a_dict_is_a_mask_within_mask(engine: Engine) -> None:
    assert Mask(_as_dict(engine)) == mask_dropping(engine.groups, 0, 3)


@pytest.mark.fault(49, "copies that are none, or given twice")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda network: AveragedModel(network), "copies is a AveragedModel; give a list"),
        (lambda network: None, "copies is a NoneType; give a list"),
        (lambda network: [network.state_dict()], r"copies\[0\] is a OrderedDict, not a module"),
        (lambda network: [network], r"copies\[0\] has parameters of the network itself"),
        (lambda network: [copy.deepcopy(network)] * 2, r"copies\[1\] has parameters of the netw"),
        (lambda network: [nn.Linear(1, 1)], r"copies\[0\] is not a copy of the network: param"),
    ],
)
def test_wrong_copies_are_refused(
    engine: Engine, wrong: Callable[[nn.Module], Any], said: str
) -> None:
    mask = mask_dropping(engine.groups, 0, 3)
    with pytest.raises(ConfigError, match=f"^draw.*: {said}"):
        engine.draw(mask, copies=wrong(engine.model))


@pytest.mark.fault(49, "arguments of attach of another type")
@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ({"model": Plain}, "the model is the class Plain; give a module"),
        ({"model": {"a": 1}}, "the model is dict; give a module"),
        ({"config": {"search": {}}}, r"config is dict; give worm_dist.WormConfig\(search="),
        ({"config": WormConfig}, "config is "),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0; give a number of optimizer steps above 0"),
        ({"steps_per_epoch": 1.5}, "steps_per_epoch is 1.5; give"),
        ({"total_steps": 0}, "total_steps is 0; give a number of optimizer steps above 0"),
    ],
)
def test_attach_refuses_arguments_of_another_type(replaced: dict[str, Any], said: str) -> None:
    network = Plain()
    given = {"model": network, "optimizer": SGD(network.parameters(), lr=0.1)}
    with pytest.raises(ConfigError, match=f"^attach: {said}"):
        worm_dist.attach(**{**given, **replaced}, example_inputs=random_images(1))


class _Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Any) -> Any:
        return self.inner(images)


def _resize(network: Any) -> None:
    network.head.weight.data = torch.zeros(10, 4)


@pytest.mark.fault(49, "modules wrapped, replaced, removed or resized after attach")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: setattr(n, "conv2", _Wrapped(n.conv2)), "parameter conv2.weight is gone since"),
        (lambda n: setattr(n, "conv2", torch.compile(n.conv2)), "parameter conv2.weight is gone"),
        (lambda n: setattr(n, "bn2", nn.BatchNorm2d(8)), "parameter bn2.weight has been replaced"),
        (lambda n: delattr(n, "bn2"), "parameter bn2.weight is gone since attach"),
        (lambda n: setattr(n, "bn2", None), "parameter bn2.weight is gone since attach"),
        (lambda n: setattr(n, "more", nn.Linear(1, 1)), "parameter more.weight is new since"),
        (_resize, r"parameter head.weight is \[10, 4\] now, and was \[10, 8\] at attach"),
    ],
)
def test_a_network_that_was_changed_is_refused(change: Callable[[Any], Any], said: str) -> None:
    engine = _attached()
    change(engine.model)
    mask = mask_dropping(engine.groups, 0, 3)
    for where, call in (
        ("check at step 1", engine.check),
        ("truncate", lambda: engine.truncate(mask)),
        ("draw", lambda: engine.draw(mask)),
    ):
        with pytest.raises(ConfigError, match=f"^{where}: {said}"):
            call()


def test_a_model_that_names_no_network_is_refused(tmp_path: Path) -> None:
    engine = _attached()
    engine.draw(mask_dropping(engine.groups, 0, 3))
    with pytest.raises(ConfigError, match="save_ticket: model: num_classes: Field required"):
        engine.save_ticket(tmp_path, model={"name": "vgg_small"})


def _one_rank_gives_a_dict() -> list[str]:
    engine, said = _attached(), []
    mask = mask_dropping(engine.groups, 0, 3)
    wrong: Any = mask if dist.get_rank() == 0 else _as_dict(engine)
    for call in (engine.truncate, engine.draw, lambda m: engine.draw(mask, copies=m)):
        try:
            call(wrong)
        except worm_dist.WormError as error:
            said.append(f"{type(error).__name__}: {error}")
    engine.draw(mask)
    return said


@pytest.mark.fault(49, "a mask that is a dict on one rank alone")
def test_no_rank_waits_for_the_one_that_misuses_it(ranks: Ranks) -> None:
    right, wrong = ranks(2, _one_rank_gives_a_dict)
    assert [text.split(":")[0] for text in right] == ["DivergenceError"] * 2 + ["ConfigError"]
    assert [text.split(":")[0] for text in wrong] == ["ConfigError"] * 3
