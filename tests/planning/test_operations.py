from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.nets import Concatenating, Flattening, Plain, Residual, Separable, Upsampling
from worm_dist.planning.operations import count_operations
from worm_dist.training.measure import count_flops

SAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    "kind", [Plain, Residual, Flattening, Separable, Concatenating, Upsampling]
)
def test_modules_add_up_to_what_a_run_counts(kind: type[nn.Module]) -> None:
    network = kind()
    total, modules = count_operations(network, SAMPLE)
    assert total == count_flops(network, SAMPLE) == sum(modules.values())


def test_a_convolution_takes_two_operations_for_every_weight_and_place() -> None:
    _, modules = count_operations(Plain(first=6, second=8), SAMPLE)
    assert modules == {
        "conv1": 2 * 64 * 6 * 3 * 9,
        "bn1": 0,
        "conv2": 2 * 64 * 8 * 6 * 9,
        "bn2": 0,
        "head": 2 * 8 * 10,
    }


class _Nested(nn.Module):
    """Has a parameter of its own around a module that it calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(3, 3))
        self.inner = nn.Linear(3, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(self.inner(rows) @ self.own)


def test_a_module_is_counted_without_those_within_it_and_for_every_call() -> None:
    network = nn.Sequential(_Nested())
    total, modules = count_operations(network, torch.zeros(1, 3))
    assert modules == {"0": 18, "0.inner": 36} and total == 54


def test_the_network_stays_as_it_was() -> None:
    network = Plain()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    count_operations(network, SAMPLE)
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[n]) for n, tensor in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
