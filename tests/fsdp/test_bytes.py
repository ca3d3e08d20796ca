"""Bytes of large networks under FSDP2, once half of their channels have left.

``LARGE_FSDP=1 launch/test -s tests/fsdp/test_bytes.py`` prints a line for each; a few minutes.
"""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision.models import VisionTransformer, resnet18

import worm_dist
from tests.ranks import Ranks
from worm_dist import WormConfig

pytestmark = [
    pytest.mark.slow("attaches to large networks"),
    pytest.mark.timeout(1800),
    pytest.mark.skipif("LARGE_FSDP" not in os.environ, reason="a few minutes; see the docstring"),
]


def _resnet() -> tuple[nn.Module, list[nn.Module]]:
    network: Any = resnet18(num_classes=10)
    layers = (network.layer1, network.layer2, network.layer3, network.layer4)
    return network, [block for layer in layers for block in layer]


def _vit() -> tuple[nn.Module, list[nn.Module]]:
    network: Any = VisionTransformer(
        image_size=32, patch_size=8, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536
    )
    return worm_dist.add_gates(network), list(network.encoder.layers)


_NETWORKS = {"ResNet-18": _resnet, "ViT-S": _vit}


def _shares(name: str, shape: tuple[int, ...]) -> dict[str, float]:
    torch.manual_seed(0)
    network, units = _NETWORKS[name]()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.1, 1)
            elif hasattr(module, "scale") and isinstance(module.scale, nn.Parameter):
                module.scale.uniform_(0.1, 1)
    num_dense = sum(p.numel() for p in network.parameters())
    names = ("replicas", "shards")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    config = WormConfig(
        search={"prune_ratio": 0.5, "every": "1ba", "l1": 0.0},
        truncation={"removal": {"duration": "2ba", "fade_steps": 2}},
        ticket={"recalibrate_batches": 1},
    )
    images = torch.randn(2, 3, 32, 32)
    engine = worm_dist.attach(network, optimizer, config, example_inputs=images[:1])

    def step() -> float:
        engine.model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return engine.traffic.sent_bytes / engine.traffic.dense_bytes

    step()
    engine.check()
    mask = engine.mask
    assert mask is not None
    engine.truncate(mask)
    frozen, *_, left = [step() for _ in range(6)]
    engine.draw(mask)
    live = sum(p.numel() for p in network.parameters()) / num_dense
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"live": live, "frozen": frozen, "left": left, "MiB": memory}


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)])
@pytest.mark.parametrize("name", _NETWORKS)
def test_little_more_than_the_live_share_is_sent(
    ranks: Ranks, name: str, shape: tuple[int, ...]
) -> None:
    size = torch.Size(shape).numel()
    outcomes = ranks.outcomes(size, _shares, name, shape, group_timeout=600)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    shares = outcomes[0].value
    ratio = shares["left"] / shares["live"]
    print(f"\n{name}, {shape} ranks: {shares}, {ratio:.4f} of the live share")
    assert ratio <= 1.03
