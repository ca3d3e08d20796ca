from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from tests.nets import Concatenating, Flattening, Plain, Residual, Separable, Upsampling
from worm_dist import add_gates
from worm_dist.groups.flops import count_flops, count_flops_by_module
from worm_dist.models import build_model

SAMPLE = torch.zeros(1, 3, 8, 8)


def _windowed() -> nn.Module:
    network: nn.Module = SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=5)
    return network


@pytest.mark.parametrize(
    "kind", [Plain, Residual, Flattening, Separable, Concatenating, Upsampling]
)
def test_modules_add_up_to_what_a_run_counts(kind: type[nn.Module]) -> None:
    network = kind()
    total = count_flops(network, SAMPLE)
    assert total and total == sum(count_flops_by_module(network, SAMPLE).values())


def test_a_convolution_takes_two_operations_for_every_weight_and_place() -> None:
    modules = count_flops_by_module(Plain(first=6, second=8), SAMPLE)
    assert modules == {
        "": 0,
        "conv1": 2 * 64 * 6 * 3 * 9,
        "bn1": 0,
        "conv2": 2 * 64 * 8 * 6 * 9,
        "bn2": 0,
        "head": 2 * 8 * 10,
    }


class _Nested(nn.Module):
    """Multiplies by itself around a module that it calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(3, 3))
        self.inner = nn.Linear(3, 3)

    def forward(self, rows: Tensor) -> Tensor:
        outer: Tensor = self.inner(self.inner(rows) @ self.own)
        return outer


def test_a_module_is_counted_without_those_within_it_and_for_every_call() -> None:
    network = nn.Sequential(_Nested())
    modules = count_flops_by_module(network, torch.zeros(1, 3))
    assert modules == {"": 0, "0": 18, "0.inner": 36}


def test_attention_is_counted_whole_whatever_computes_it() -> None:
    """torch's fast path for transformers and its fused attention on CPUs count as nothing."""
    network = build_model("vit_small", 10, 1)
    modules = count_flops_by_module(network, torch.zeros(1, 1, 8, 8))
    of_layer = {
        name.removeprefix("encoder.layers.encoder_layer_0."): flops
        for name, flops in modules.items()
        if "encoder_layer_0." in name and flops
    }
    assert of_layer == {
        "self_attention": 2 * 17 * 48 * (3 * 48) + 2 * (2 * 17 * 17 * 48),
        "self_attention.out_proj": 2 * 17 * 48 * 48,
        "mlp.0": 2 * 17 * 48 * 192,
        "mlp.3": 2 * 17 * 192 * 48,
    }
    embedding, head = 2 * 16 * 48 * 4, 2 * 48 * 10
    assert sum(modules.values()) == 4 * sum(of_layer.values()) + embedding + head


@pytest.mark.parametrize("build", [_windowed, lambda: build_model("vit_small", 10, 3)])
def test_gates_take_nothing_that_counts(build: Callable[[], nn.Module]) -> None:
    network = build()
    total = count_flops(network, SAMPLE)
    assert total == sum(count_flops_by_module(network, SAMPLE).values())
    gated = add_gates(network)
    assert total == count_flops(gated, SAMPLE) == sum(count_flops_by_module(gated, SAMPLE).values())


def test_the_network_stays_as_it_was() -> None:
    network = _windowed()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    count_flops_by_module(network, SAMPLE)
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[n]) for n, tensor in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert not any(type(module).__name__.startswith("Fewer") for module in network.modules())
