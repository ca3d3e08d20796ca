"""Which modules are sharded by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from worm_dist.training.fully_sharded import modules_to_shard

MIB = 2**20


def _names(network: nn.Module, unit_bytes: int) -> list[str]:
    names = {module: name for name, module in network.named_modules()}
    return [names[module] for module in modules_to_shard(network, unit_bytes)]


def _blocks() -> nn.Sequential:
    """Two blocks of 8,000 bytes, and a head of 400."""
    blocks = [
        nn.Sequential(nn.Linear(10, 100, bias=False), nn.ReLU(), nn.Linear(100, 10, bias=False))
        for _ in range(2)
    ]
    return nn.Sequential(*blocks, nn.Linear(10, 10, bias=False))


@pytest.mark.parametrize(
    ("unit_bytes", "names"),
    [
        (8001, []),  # the network itself comes in any case
        (8000, ["0", "1"]),
        (4001, ["0", "1"]),
        (4000, ["0.0", "0.2", "1.0", "1.2"]),
        (400, ["0.0", "0.2", "1.0", "1.2", "2"]),
    ],
)
def test_a_module_is_sharded_from_the_size_on(unit_bytes: int, names: list[str]) -> None:
    assert _names(_blocks(), unit_bytes) == names


def test_a_list_of_modules_is_never_called() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(4))
            self.last = nn.Linear(10, 40, bias=False)

    assert _names(Network(), 500) == ["last"]


def test_attention_uses_its_projection_without_calling_it() -> None:
    network = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16))
    assert _names(network, 1024) == ["0", "1"]


def test_a_network_with_a_parameter_of_its_own_is_taken_apart() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(10))
            self.blocks = _blocks()

    assert _names(Network(), 8000) == ["blocks.0", "blocks.1"]


def test_a_parameter_in_two_places_stays_in_one_unit() -> None:
    network = _blocks()
    network[1][0].weight = network[0][0].weight  # type: ignore[index]
    assert _names(network, 400) == []


def test_no_parameter_is_counted_twice() -> None:
    with torch.device("meta"):
        network = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(5)])
    assert _names(network, MIB) == ["0", "1", "2", "3", "4"]
