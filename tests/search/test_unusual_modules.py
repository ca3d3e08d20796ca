"""Modules that keep more than parameters: tensors with a graph, tensors made in inference mode,
weights that are computed, TorchScript.  They are drawn like any other, or refused in one line."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images, randomise
from tests.ranks import NO_GROUP, Ranks
from worm_dist import ConfigError, Engine, Mask, WormConfig

pytestmark = pytest.mark.slow("fifty attachments, a quarter of a minute")


class _Keeping(Plain):
    """Keeps its features, as for Grad-CAM, attention maps and distillation.

    Args:
        where: in what.
    """

    average: Tensor | None

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.kept: Any = {
            "tensor": None,
            "dict": {},
            "list": [],
            "nested": {"levels": [(), {}]},
            "object": SimpleNamespace(features=None),
            "buffer": None,
            "loss": None,
            "lock": None,
        }[where]
        self.register_buffer("average", torch.zeros(10) if where == "buffer" else None)
        if where == "lock":
            self.lock = threading.Lock()

    def forward(self, images: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(images)))
        features = torch.relu(self.bn2(self.conv2(inner)))
        logits: Tensor = self.head(features.mean((2, 3)))
        if self.where in ("tensor", "lock"):
            self.kept = features
        elif self.where == "dict":
            self.kept["features"] = features
        elif self.where == "list":
            self.kept[:] = [inner, features]
        elif self.where == "nested":
            self.kept["levels"][1]["second"] = [features, (inner,)]
        elif self.where == "object":
            self.kept.features = features
        elif self.where == "buffer":
            assert self.average is not None
            self.average = 0.9 * self.average + 0.1 * logits.mean(0)
        elif self.where == "loss":
            self.kept = logits.square().mean()
            self.kept.retain_grad() if self.kept.requires_grad else None
        return logits


class _Hook:
    """Keeps what it hears, as tools that look into networks do."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.heard[:] = [output]


def _with_hook() -> nn.Module:
    network = Plain()
    network.bn2.register_forward_hook(_Hook())
    return network


def _with(layer: str, change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        network = Plain()
        module = network.get_submodule(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of this is of old
            change(module)
        return network

    return build


def _pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.3)


def _with_inference_buffer() -> nn.Module:
    network = Plain()
    with torch.inference_mode():
        grid = torch.linspace(0, 1, 8)
    network.register_buffer("grid", grid)
    network.note = grid + 1
    return network


_BOTH, _FIRST, _SECOND = {"conv1", "conv2"}, {"conv1"}, {"conv2"}
_NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    **{
        f"keeps a {where}": (partial(_Keeping, where), _BOTH)
        for where in ("tensor", "dict", "list", "nested", "object", "buffer", "loss", "lock")
    },
    "keeps by a hook": (_with_hook, _BOTH),
    "old weight_norm of the head": (_with("head", nn.utils.weight_norm), _FIRST),
    "old weight_norm of a layer": (_with("conv1", nn.utils.weight_norm), _SECOND),
    "old spectral_norm of the head": (_with("head", nn.utils.spectral_norm), _FIRST),
    "weight_norm of the head": (_with("head", parametrizations.weight_norm), _FIRST),
    "orthogonal head": (_with("head", parametrizations.orthogonal), _FIRST),
    "pruned head": (_with("head", _pruned), _FIRST),
    "pruned layer": (_with("conv1", _pruned), _SECOND),
    "buffer of inference mode": (_with_inference_buffer, _BOTH),
}
"""And the groups that can be drawn: what a computed weight reads stays."""


def _attached(network: nn.Module, **truncation: Any) -> Engine:
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    return worm_dist.attach(
        model,
        SGD(network.parameters(), lr=0.01, momentum=0.9),
        WormConfig(truncation=truncation, ticket={"recalibrate_batches": 0}),
        example_inputs=random_images(2),
        steps_per_epoch=10,
    )


def _step(engine: Engine, number: int) -> Tensor:
    rank = dist.get_rank() if dist.is_initialized() else 0
    engine.optimizer.zero_grad()
    loss: Tensor = engine.model(random_images(6, seed=2 * number + rank)).square().mean()
    (loss + engine.penalty()).backward()
    engine.optimizer.step()
    return loss


def _drawn(name: str, has_run: bool) -> tuple[set[str], float, float, dict[str, Tensor]]:
    """Groups; how far the drawn network is from the masked one, and from itself a step later; the
    weights in the end.  A loss is kept all the while."""
    torch.manual_seed(0)
    network = _NETWORKS[name][0]()
    randomise(network, seed=3)
    kept = network(random_images(2)).mean() if has_run else None
    engine = _attached(network, frozen_weights="hold")
    for number in range(2):
        kept = _step(engine, number)
    mask = Mask({g.name: torch.arange(g.num_channels) % 2 == 0 for g in engine.groups})
    engine.check()
    engine.truncate(mask)
    kept = _step(engine, 2)
    images = random_images(4, seed=77)
    with torch.no_grad():
        for group in engine.groups:
            for norm in group.norms:
                for parameter, _ in norm.parameters:
                    network.get_parameter(parameter)[~mask[group.name]] = 0
        expected = network.eval()(images)
        network.train()
    engine.draw(mask)
    with torch.no_grad():
        difference = float((network.eval()(images) - expected).abs().max())
    network.train()
    assert kept is not None and _step(engine, 3) is not kept
    with torch.no_grad():
        moved = float((network.eval()(images) - expected).abs().max())
    state = {key: value.clone() for key, value in network.state_dict().items()}
    return set(engine.groups.sizes), difference, moved, state


_WORLDS = [
    (name, world)
    for name in _NETWORKS
    for world in (NO_GROUP, 2)
    if world == NO_GROUP or "inference" not in name  # of which DDP itself can make nothing
]


@pytest.mark.parametrize("has_run", [False, True], ids=["", "has run before"])
@pytest.mark.parametrize(("name", "world"), _WORLDS)
def test_it_is_drawn_like_any_other(ranks: Ranks, name: str, has_run: bool, world: int) -> None:
    """deepcopy refuses tensors with a graph: attach, or the rehearsal of a draw, ended in its
    RuntimeError."""
    results = ranks(world, _drawn, name, has_run)
    for groups, difference, moved, state in results:
        assert groups == _NETWORKS[name][1]
        assert difference < 1e-5 < moved
        for key, value in state.items():
            if "running" not in key and "average" not in key and "batches" not in key:
                assert torch.equal(value, results[0][3][key]), key


@pytest.mark.parametrize("name", [name for name in _NETWORKS if name.startswith("keeps")])
def test_what_is_kept_is_left_alone(name: str) -> None:
    """It has its graph after attach as before, and its own values."""
    network = _NETWORKS[name][0]()
    network(random_images(2, seed=5))
    hooks: list[Any] = [h for m in network.modules() for h in m._forward_hooks.values()]
    kept: Any = hooks[0].heard if hooks else getattr(network, "kept", None)
    values = copy.copy(kept)
    _attached(network)
    assert (hooks[0].heard if hooks else network.kept) is kept
    if isinstance(kept, Tensor):
        assert kept.grad_fn is not None
    elif isinstance(kept, list):
        assert all(one is other for one, other in zip(kept, values, strict=True))
        assert all(tensor.grad_fn is not None for tensor in kept)
    elif isinstance(kept, SimpleNamespace):
        assert kept.features is values.features


# ---- inference mode ------------------------------------------------------------------------------


def test_a_network_made_in_inference_mode_is_refused_in_one_line() -> None:
    """Hooks could not be registered on its parameters, and torch said so."""
    with torch.inference_mode():
        network = Plain()
    with pytest.raises(ConfigError, match=r"parameter conv1.weight was made in inference mode"):
        _attached(network)
    assert not network._forward_pre_hooks


def test_a_part_loaded_in_inference_mode_is_named() -> None:
    network = Plain()
    with torch.inference_mode():
        network.head = nn.Linear(8, 10)
    with pytest.raises(ConfigError, match=r"parameter head.weight was made in inference mode"):
        _attached(network)


def test_an_example_made_in_inference_mode_will_do() -> None:
    network = Plain()
    with torch.inference_mode():
        example = random_images(2) + 0
    engine = worm_dist.attach(
        network, SGD(network.parameters(), lr=0.01), example_inputs={"images": example}
    )
    _step(engine, 0)
    engine.draw(Mask({g.name: torch.arange(g.num_channels) > 1 for g in engine.groups}))
    _step(engine, 1)


# ---- TorchScript ---------------------------------------------------------------------------------


class _Act(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def _network(act: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        act,
        nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def _scripted(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has better things by now
        if name == "whole":
            return torch.jit.script(_network(nn.ReLU()))
        if name == "traced whole":
            traced: nn.Module = torch.jit.trace(_network(nn.ReLU()), random_images(2))
            return traced
        network = _network(_Act())
        if name == "part":
            network[2] = torch.jit.script(network[2])
        elif name == "traced part":
            network[2] = torch.jit.trace(network[2], torch.randn(2, 8, 6, 6))
        elif name == "block":
            network[3] = torch.jit.script(network[3])
        return network


_SCRIPTED = {
    "whole": "it is TorchScript",
    "traced whole": "it is TorchScript",
    "part": "2 is TorchScript",
    "traced part": "2 is TorchScript",
    "block": "3 is TorchScript",
}


def _refused(name: str) -> tuple[str, int]:
    network = _scripted(name)
    parameters = list(network.parameters())
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    try:
        worm_dist.attach(model, SGD(parameters, lr=0.01), example_inputs=random_images(2))
    except ConfigError as error:
        return str(error), sum(bool(p._backward_hooks) for p in parameters)
    return "nothing", 0


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("name", _SCRIPTED)
def test_torchscript_is_named(ranks: Ranks, name: str, world: int) -> None:
    """It was not copied, or hooks could not be registered on it, and torch said so."""
    for said, num_hooks in ranks(world, _refused, name):
        assert (
            _SCRIPTED[name] in said and "pass the module that was given to torch.jit.script" in said
        )
        assert "\n" not in said and num_hooks == 0


class _Functional(Plain):
    """Calls a scripted function, which is no module."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.act = torch.jit.script(_hard)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.act(self.bn1(self.conv1(images)))
        logits: Tensor = self.head(torch.relu(self.bn2(self.conv2(inner))).mean((2, 3)))
        return logits


def _hard(x: Tensor) -> Tensor:
    return x * torch.clamp(x + 3, 0, 6) / 6


def test_a_scripted_function_is_no_obstacle() -> None:
    network = _Functional()
    engine = _attached(network)
    assert set(engine.groups.sizes) == _BOTH
    _step(engine, 0)
    engine.draw(Mask({g.name: torch.arange(g.num_channels) > 1 for g in engine.groups}))
    _step(engine, 1)
