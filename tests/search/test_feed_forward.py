"""Pairs of layers, with neurons between them that can be removed one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.ops import MLP

from tests.attending import KINDS, built, inputs_of
from tests.gradients import gradient
from worm_dist.groups.feed_forward import find_feed_forwards


def _convnext() -> tuple[nn.Module, tuple[Tensor, ...]]:
    network = ConvNeXt([CNBlockConfig(4, None, 2)], num_classes=5).double()
    return network, (torch.randn(2, 3, 16, 16, dtype=torch.float64),)


def _cases() -> dict[str, Any]:
    kinds = {k: (lambda k=k: (built(k), inputs_of(k))) for k in KINDS if "attention" not in k}
    mlp = lambda: (MLP(6, [8, 9, 4]).double(), (torch.randn(3, 6, dtype=torch.float64),))  # noqa: E731
    return kinds | {"ConvNeXt": _convnext, "MLP": mlp}


@torch.no_grad()
def _without_every_other(network: nn.Module) -> nn.Module:
    cut = copy.deepcopy(network)
    for first, second in find_feed_forwards(network):
        makes, reads = cut.get_submodule(first), cut.get_submodule(second)
        assert isinstance(makes, nn.Linear) and isinstance(reads, nn.Linear)
        kept = torch.arange(0, reads.in_features, 2)
        makes.weight = nn.Parameter(makes.weight[kept])
        if makes.bias is not None:
            makes.bias = nn.Parameter(makes.bias[kept])
        reads.weight = nn.Parameter(reads.weight[:, kept])
    return cut


@torch.no_grad()
def _unread(network: nn.Module) -> nn.Module:
    silenced = copy.deepcopy(network)
    for _, second in find_feed_forwards(network):
        silenced.get_parameter(f"{second}.weight")[:, 1::2] = 0
    return silenced


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", _cases())
def test_neurons_that_nothing_reads_can_go(kind: str, training: bool) -> None:
    network, inputs = _cases()[kind]()
    network.train(training)
    assert find_feed_forwards(network)
    cut, silenced = _without_every_other(network), _unread(network)
    results = []
    for one in (cut, silenced):
        output = one(*inputs)
        output = output if isinstance(output, Tensor) else output[0]
        output.sin().sum().backward()
        first = next(p for p in one.parameters() if p.grad is not None)
        with torch.no_grad():  # in eval mode torch computes whole encoder layers at once
            at_once = one(*inputs)
        at_once = at_once if isinstance(at_once, Tensor) else at_once[0]
        results.append((output, gradient(first), at_once))
    for mine, expected in zip(*results, strict=True):
        if mine.shape == expected.shape:
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
        else:
            torch.testing.assert_close(mine, expected[::2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        (
            "transformer",
            [
                ("encoder.layers.0.linear1", "encoder.layers.0.linear2"),
                ("decoder.layers.0.linear1", "decoder.layers.0.linear2"),
                ("decoder.layers.1.linear1", "decoder.layers.1.linear2"),
            ],
        ),
        ("timm ViT", [(f"blocks.{i}.mlp.fc1", f"blocks.{i}.mlp.fc2") for i in (0, 1)]),
        (
            "BERT",
            [
                (f"encoder.layer.{i}.intermediate.dense", f"encoder.layer.{i}.output.dense")
                for i in (0, 1)
            ],
        ),
        (
            "Swin",
            [
                (f"features.{i}.{j}.mlp.0", f"features.{i}.{j}.mlp.3")
                for i in (1, 3)
                for j in (0, 1)
            ],
        ),
    ],
)
def test_pairs_by_name(kind: str, pairs: list[tuple[str, str]]) -> None:
    assert find_feed_forwards(built(kind)) == pairs


def test_layers_in_a_row_share_no_neurons() -> None:
    assert find_feed_forwards(MLP(6, [8, 9, 4])) == [("0", "3"), ("3", "6")]


def test_a_norm_between_the_layers_mixes_neurons() -> None:
    assert find_feed_forwards(MLP(6, [8, 4], norm_layer=nn.LayerNorm)) == []


class GatedMlp(nn.Module):
    """SwiGLU: what the first layer makes is two halves, one a factor of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 12)
        self.fc2 = nn.Linear(6, 4)


class NormedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.fc2 = nn.Linear(6, 4)


class UserNet(nn.Module):
    """Of the same names, but nobody said what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 4)


@pytest.mark.parametrize("kind", [GatedMlp, NormedMlp, UserNet])
def test_what_is_not_known_to_be_a_pair_is_left_alone(kind: type[nn.Module]) -> None:
    assert find_feed_forwards(nn.Sequential(kind())) == []


@pytest.mark.parametrize("kind", ["GluMlp", "SwiGLU", "ConvMlp", "GlobalResponseNormMlp"])
def test_kin_of_timms_mlp_are_left_alone(kind: str) -> None:
    mlp = pytest.importorskip("timm.layers.mlp")
    assert find_feed_forwards(nn.Sequential(getattr(mlp, kind)(4, 8))) == []
