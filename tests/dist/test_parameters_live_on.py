"""A parameter that becomes smaller is the same object: its hooks and attributes, and whatever
refers to it, go on."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, gated, random_images
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from tests.settings import at_once
from worm_dist import Engine, WormConfig

pytestmark = pytest.mark.slow("draws on two ranks, five seconds")

_DROPPED = (0, 2, 3, 9)
_LIMIT = 1e-4
_TRUNCATIONS: dict[str, dict[str, Any]] = {
    "hold": {"frozen_weights": "hold"},
    "remove": at_once(2),
    "off": {"mode": "off"},
}


class _Clamp:
    """A hook that counts how often it is called."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.num_calls += 1
        return gradient.clamp(-_LIMIT, _LIMIT)


class _Counter:
    """A hook behind the accumulation of the gradient."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        self.num_calls += 1


def _attached(network: nn.Module, truncation: str) -> Engine:
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    return worm_dist.attach(
        model,
        SGD(network.parameters(), lr=0.05, momentum=0.9),
        WormConfig(truncation=_TRUNCATIONS[truncation], search={"l1": 0.0}),
        example_inputs=random_images(1),
        steps_per_epoch=3,
    )


def _train(engine: Engine, num_steps: int) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(num_steps):
        engine.optimizer.zero_grad()
        engine.model(random_images(6, seed=2 * step + rank)).square().sum().backward()
        engine.optimizer.step()


def _marked(truncation: str, has_gates: bool) -> list[str]:
    """What is wrong after a draw."""
    torch.manual_seed(0)
    network: nn.Module = gated() if has_gates else Residual()
    names = dict(network.named_parameters())
    cached, clamps, counters = list(names.values()), {}, {}
    for name, parameter in names.items():
        parameter.tag = f"mine: {name}"  # type: ignore[attr-defined]
        clamps[name], counters[name] = _Clamp(), _Counter()
        parameter.register_hook(clamps[name])
        parameter.register_post_accumulate_grad_hook(counters[name])
    by_parameter = {parameter: name for name, parameter in names.items()}
    weak = {name: weakref.ref(parameter) for name, parameter in names.items()}
    engine = _attached(network, truncation)
    optimized = [p for group in engine.optimizer.param_groups for p in group["params"]]
    _train(engine, 2)
    mask = mask_dropping(engine.groups, *_DROPPED)
    if truncation != "off":
        engine.truncate(mask)
        _train(engine, 3)
    shapes = {name: parameter.shape for name, parameter in names.items()}
    engine.draw(mask)
    _train(engine, 1)

    wrong = []
    left = dict(network.named_parameters())
    kept = {by_parameter.get(p, f"a new {name}") for name, p in left.items()}
    if missing := {n for n in kept if "new" in n} | {n for n in names if n not in kept}:
        wrong += [f"{name} is another object" for name in missing if "scale" not in name]
    for name in kept & names.keys():
        parameter = names[name]
        num_steps = 3 if truncation == "off" else 6
        if clamps[name].num_calls != num_steps or counters[name].num_calls != num_steps:
            wrong.append(f"{name}: hooks were called {clamps[name].num_calls} times")
        if parameter.tag != f"mine: {name}":  # type: ignore[attr-defined]
            wrong.append(f"{name} has lost its mark")
        if weak[name]() is not parameter or not any(parameter is p for p in optimized):
            wrong.append(f"{name} is lost to a reference or the optimizer")
        assert parameter.grad is not None
        if float(parameter.grad.abs().max()) > _LIMIT * (1 + 1e-6):
            wrong.append(f"{name}: a gradient past its hook")
    if not any(names[name].shape != shape for name, shape in shapes.items()):
        wrong.append("nothing has become smaller")
    alive = [parameter for parameter in cached if by_parameter[parameter] in kept]
    one = nn.utils.clip_grad_norm_(alive, 1e9)
    other = nn.utils.clip_grad_norm_(network.parameters(), 1e9)
    if not torch.isclose(one, other) or not one:
        wrong.append(f"a list made before has the norm {one}, the network {other}")
    return wrong


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("has_gates", [False, True], ids=["", "gates"])
@pytest.mark.parametrize("truncation", _TRUNCATIONS)
def test_hooks_attributes_and_references_go_on(
    ranks: Ranks, truncation: str, has_gates: bool, world: int
) -> None:
    """Gradients were clamped no more after a draw, and a list made before it clipped dead ones."""
    for wrong in ranks(world, _marked, truncation, has_gates):
        assert wrong == []


def _handle_of_before() -> tuple[int, int]:
    """Calls of a hook that is taken away after the draw, by the handle from before."""
    network, clamp = Residual(), _Clamp()
    handle = network.stem.weight.register_hook(clamp)
    engine = _attached(network, "off")
    _train(engine, 1)
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    _train(engine, 1)
    before = clamp.num_calls
    handle.remove()
    _train(engine, 1)
    return before, clamp.num_calls


@pytest.mark.parametrize("world", [NO_GROUP, 2])
def test_a_handle_from_before_the_draw_still_removes_its_hook(ranks: Ranks, world: int) -> None:
    for counts in ranks(world, _handle_of_before):
        assert counts == (2, 2)


def test_a_graph_that_is_kept_over_the_draw_does_no_harm() -> None:
    """Whoever keeps a loss keeps the nodes that accumulate gradients of the old shapes."""
    network = Residual()
    engine = _attached(network, "off")
    _train(engine, 1)
    kept = network(random_images(2)).square().mean()
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    _train(engine, 2)
    assert kept.grad_fn is not None
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())


def test_modules_keep_their_hooks_and_attributes() -> None:
    network = Residual()
    seen: list[int] = []
    vars(network.stem)["note"] = "mine"
    network.stem.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    engine = _attached(network, "off")
    stem = network.stem
    _train(engine, 1)
    engine.draw(mask_dropping(engine.groups, *_DROPPED))
    seen.clear()
    _train(engine, 1)
    assert seen == [5] and network.stem is stem and stem.note == "mine"
    assert isinstance(network.stem.weight, nn.Parameter)
