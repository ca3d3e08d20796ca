"""Attaching leaves no trace, whether it succeeds or fails: state, buffers, hooks, modes, modules
and random states are the same to the bit, whatever a forward pass writes to."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
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
from tests.ranks import Ranks
from tests.resuming import differences
from worm_dist import ConfigError, WormConfig, WormError
from worm_dist.pruning.recorded_inputs import RecordedInputs


class _NormAct(nn.BatchNorm2d):
    """A norm with a part of its own, as in timm."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(super().forward(input))
        return output


class _Following(nn.BatchNorm2d):
    """A norm that follows its batches in eval mode too, by tensors of its own."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.running_mean.lerp_(input.mean((0, 2, 3)).to(self.running_mean), 0.1)
            self.running_var = torch.lerp(
                self.running_var, input.var((0, 2, 3)).to(self.running_var), 0.1
            )
        return super().forward(input)


class _Normed(nn.Module):
    """A network whose norms are of another class.

    Args:
        norm: the class.
    """

    def __init__(self, norm: type[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), norm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu())).relu()
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class _Queueing(Residual):
    """A queue with a pointer, as in MoCo, a running average that is assigned, and counters that are
    no tensors."""

    queue: Tensor
    pointer: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(10, 12))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("average", torch.zeros(10), persistent=False)
        self.num_passes = 0
        self.shapes: list[tuple[int, ...]] = []
        self.last: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        at = int(self.pointer)
        self.queue[:, at] = logits[0].detach()
        self.pointer[0] = (at + 1) % 12
        self.average = 0.9 * self.average + 0.1 * logits.detach().mean(0)
        self.num_passes += 1
        self.shapes.append(tuple(images.shape))
        self.last["features"] = logits
        return logits


class _Codebook(Plain):
    """Codes that follow what is put out, as in VQ-VAE, by writing to a parameter's data."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, 10), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        self.codes.data.lerp_(logits.detach().mean(0).to(self.codes.dtype), 0.1)
        return logits


class _Random(Plain):
    """Draws numbers from three sources, wherever it is."""

    def forward(self, images: Tensor) -> Tensor:
        random.random(), numpy.random.rand(), torch.rand(3)
        return super().forward(images)


class _Hooking(Plain):
    """Listens to its parts from its first pass on, as Hugging Face's networks do; the hooks write
    to where the network looks, so that it must be its own."""

    def __init__(self) -> None:
        super().__init__()
        self.is_hooked = False
        self.heard: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        if not self.is_hooked:
            self.is_hooked = True
            self.bn1.register_forward_hook(self._hear)
            self.conv2.register_forward_pre_hook(lambda module, args: (args[0] * 1,))
        self.heard.clear()
        logits = super().forward(images)
        assert "bn1" in self.heard, "its hooks are another network's"
        return logits

    def _hear(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.heard["bn1"] = output


class _Growing(Plain):
    """Makes parts without weights at its first pass, when it knows its inputs."""

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self, "crop"):
            self.crop = nn.Sequential(nn.AvgPool2d(1), nn.Identity())
        return super().forward(self.crop(images))


class _Replacing(Plain):
    """Puts a part into another at its first pass, so that its parameters have other names."""

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.head, nn.Linear):
            self.add_module("head", nn.Sequential(self.head, nn.Identity()))
        return super().forward(images)


class _Adding(Plain):
    """Makes a layer when it knows its inputs."""

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Conv2d(images.shape[1], 3, 1).to(images)
        return super().forward(self.late(images))


class _Wrapping(Plain):
    """Wraps the forward of a part at its first pass, as tools that offload weights do."""

    def forward(self, images: Tensor) -> Tensor:
        if "forward" not in vars(self.conv1):
            self.conv1.forward = _Twice(self.conv1)  # type: ignore[method-assign]
        return super().forward(images)


class _Twice:
    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        return type(self.module).forward(self.module, input) * 2


def _spectral() -> nn.Module:
    network = Plain()
    nn.utils.parametrizations.spectral_norm(network.head)
    return network


def _spectral_of_old() -> nn.Module:
    network = Plain()
    network.head = nn.utils.spectral_norm(network.head)
    return network


_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "norm with a part": lambda: _Normed(_NormAct),
    "norm that follows": lambda: _Normed(_Following),
    "queue": _Queueing,
    "codebook": _Codebook,
    "random": _Random,
    "hooks": _Hooking,
    "growing": _Growing,
    "wrapping": _Wrapping,
    "spectral norm": _spectral,
    "old spectral norm": _spectral_of_old,
}
_MODES: dict[str, Callable[[nn.Module], Any]] = {
    "train": lambda network: network.train(),
    "eval": lambda network: network.eval(),
    "mixed": lambda network: [m.eval() for m in network.modules() if isinstance(m, nn.Conv2d)],
}


def _traces(network: nn.Module) -> dict[str, Any]:
    """All that must be the same but the one hook by which an engine hears of inputs."""
    own = {key for key, hook in network._forward_pre_hooks.items() if _is_engines(hook)}
    return {
        "state": {name: (id(v), v.clone()) for name, v in _state(network).items()},
        "buffers": {name: (id(v), v.clone()) for name, v in network.named_buffers()},
        "trains": {name: p.requires_grad for name, p in network.named_parameters()},
        "gradients": [name for name, p in network.named_parameters() if p.grad is not None],
        "modules": {name: (id(m), type(m), m.training) for name, m in network.named_modules()},
        "attributes": {name: _attributes(module) for name, module in network.named_modules()},
        "hooks": {
            f"{name}.{key}": [id(hook) for number, hook in table.items() if number not in own]
            for name, module in network.named_modules()
            for key, table in vars(module).items()
            if "_hooks" in key and isinstance(table, dict)
        },
        "random": (random.getstate(), torch.get_rng_state()),
        "numpy": numpy.random.get_state(legacy=False)["state"]["key"].tolist(),
        "gradients are on": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def _is_engines(hook: object) -> bool:
    return isinstance(hook, RecordedInputs) and hook.belongs_to_an_engine


def _state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict(keep_vars=True))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Its own; of containers what is in them."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return {k: copy.copy(v) if isinstance(v, (dict, list)) else v for k, v in own.items()}


def _attach(network: nn.Module, example_inputs: Any) -> worm_dist.Engine:
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return worm_dist.attach(
        model, SGD(trained, lr=0.1), WormConfig(), example_inputs=example_inputs
    )


@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize("name", _NETWORKS)
def test_attaching_leaves_no_trace(name: str, mode: str) -> None:
    """Running statistics of timm's norms changed, queues moved on, and hooks that a network
    installs when it first runs were lost."""
    network = _NETWORKS[name]()
    randomise(network, seed=3)
    _MODES[mode](network)
    before = _traces(network)
    engine = _attach(network, random_images(2) * 5)
    assert list(differences(before, _traces(network), name)) == []
    assert engine.groups
    engine.detach()
    assert list(differences(before, _traces(network), name)) == []
    network.train()
    network(random_images(2)).sum().backward()


def _fails_on_channels(network: nn.Module) -> None:
    _attach(network, random_images(2, channels=4))


def _fails_on_arguments(network: nn.Module) -> None:
    _attach(network, {"pictures": random_images(2)})


def _fails_on_groups(network: nn.Module) -> None:
    worm_dist.attach(
        network,
        SGD([p for p in network.parameters() if p.requires_grad], lr=0.1),
        WormConfig(search={"dense": ["*"]}),
        example_inputs=random_images(2),
    )


def _fails_on_the_optimizer(network: nn.Module) -> None:
    worm_dist.attach(
        network, SGD([nn.Parameter(torch.zeros(1))], lr=0.1), example_inputs=random_images(2)
    )


_FAILURES: dict[str, Callable[[nn.Module], None]] = {
    "channels": _fails_on_channels,
    "arguments": _fails_on_arguments,
    "groups": _fails_on_groups,
    "optimizer": _fails_on_the_optimizer,
}


@pytest.mark.parametrize("failure", _FAILURES)
@pytest.mark.parametrize("name", _NETWORKS)
def test_a_failed_attach_leaves_no_trace(name: str, failure: str) -> None:
    """Hugging Face's networks put out nothing of their hidden states any more."""
    network = _NETWORKS[name]()
    before = _traces(network)
    with pytest.raises(WormError):
        _FAILURES[failure](network)
    assert list(differences(before, _traces(network), name)) == []
    network(random_images(2)).sum().backward()
    _attach(network, random_images(2)).detach()


def _on_one_rank(name: str, failing: int) -> tuple[list[str], str]:
    """What has changed of a rank's network once attaching failed on one of them, and what was
    said; then it is attached in earnest."""
    network = _NETWORKS[name]()
    model = DistributedDataParallel(network)
    optimizer = SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    before = _traces(network)
    said = "nothing"
    channels = 4 if dist.get_rank() == failing else 3
    try:
        worm_dist.attach(model, optimizer, example_inputs=random_images(2, channels=channels))
    except WormError as error:
        said = str(error)
    wrong = list(differences(before, _traces(network), name))
    engine = worm_dist.attach(model, optimizer, example_inputs=random_images(2))
    wrong += list(differences(before, _traces(network), name))
    engine.model(random_images(2)).sum().backward()
    return wrong, said


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("name", ["norm with a part", "queue", "hooks"])
def test_where_one_rank_cannot_attach_none_has_a_trace(
    ranks: Ranks, name: str, failing: int
) -> None:
    results = ranks(2, _on_one_rank, name, failing)
    for wrong, said in results:
        assert wrong == [] and said != "nothing"
    assert "does not run on the example inputs" in results[failing][1]


_LATE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "replacing": (_Replacing, "head.0.bias"),
    "adding": (_Adding, "late.bias"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(6, 3), nn.BatchNorm2d(6)), "0.weight"),
}


@pytest.mark.parametrize("name", _LATE)
def test_parameters_that_come_with_the_first_pass_are_asked_for_before(name: str) -> None:
    """The groups were those of a copy that had run, and had names that the network had not."""
    build, parameter = _LATE[name]
    network = build()
    with pytest.raises(ConfigError, match=f"parameter {parameter} .* first forward pass; run it"):
        worm_dist.attach(
            network, SGD([nn.Parameter(torch.zeros(1))], lr=0.1), example_inputs=random_images(2)
        )
    network(random_images(2))
    if name != "lazy":
        _attach(network, random_images(2))


# ---- Hugging Face's own --------------------------------------------------------------------------


def _segformer() -> tuple[nn.Module, Mapping[str, Any]]:
    import transformers

    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=8,
        num_attention_heads=[1, 2, 2, 2],
        num_labels=3,
    )
    network = transformers.SegformerForSemanticSegmentation(config)
    return network, {"pixel_values": torch.randn(2, 3, 32, 32)}


def _bert() -> tuple[nn.Module, Mapping[str, Any]]:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
    )
    network = worm_dist.add_gates(transformers.BertForSequenceClassification(config))
    return network, {"input_ids": torch.arange(16).view(2, 8)}


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("is_warm", [False, True], ids=["", "has run before"])
@pytest.mark.parametrize("make", [_segformer, _bert], ids=["SegFormer", "BERT"])
def test_hidden_states_are_put_out_as_before(
    make: Callable[[], tuple[nn.Module, Mapping[str, Any]]], is_warm: bool, fails: bool
) -> None:
    """They are collected by hooks that are installed at the first pass; attached before it, the
    networks put out none, or raised."""
    network, inputs = make()
    network.eval()
    if is_warm:
        network(**inputs, output_hidden_states=True)
    before = _traces(network)
    if fails:
        with pytest.raises(ConfigError):
            _attach(network, {name: value[:, 3:] * 1000 for name, value in inputs.items()})
    else:
        _attach(network, dict(inputs))
    assert list(differences(before, _traces(network), "network")) == []
    hidden = network(**inputs, output_hidden_states=True).hidden_states
    expected = make()[0].eval()(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == len(expected) > 1
