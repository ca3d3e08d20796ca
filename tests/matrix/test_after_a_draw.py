"""What a draw must not lose besides the numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import WormConfig
from worm_dist.models.resnet import ResNet


def _is_channels_last(tensor: Tensor) -> bool:
    """By its strides: a size of one fits every format, but DistributedDataParallel compares."""
    wanted = torch.empty(tensor.shape, memory_format=torch.channels_last)
    return tensor.stride() == wanted.stride()


def test_channels_last_stays_channels_last() -> None:
    """Else every convolution after the draw turns its weight round again in each step."""
    network = ResNet(10, 3, [8, 16], blocks_per_stage=1)  # with a 1x1 convolution
    network.to(memory_format=torch.channels_last)
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9)
    config = WormConfig(truncation={"frozen_weights": "hold"})
    engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
    images = random_images(4).to(memory_format=torch.channels_last)
    network(images).square().mean().backward()
    optimizer.step()
    engine.draw(mask_dropping(engine.groups, 0, 9))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert _is_channels_last(module.weight)
            assert _is_channels_last(optimizer.state[module.weight]["momentum_buffer"])


def _train_with_sharded_state() -> str:
    """What attach says; if it says nothing, what the draw leaves."""
    model = DistributedDataParallel(Residual())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=SGD, lr=0.05, momentum=0.9
    )
    try:
        engine = worm_dist.attach(
            model,
            optimizer,
            WormConfig(truncation={"frozen_weights": "hold"}),
            example_inputs=random_images(1),
        )
    except worm_dist.BackendError as refusal:
        return str(refusal)
    engine.draw(mask_dropping(engine.groups, 0, 9))
    before = [p.detach().clone() for p in engine.model.parameters()]
    engine.model(random_images(4)).square().mean().backward()
    optimizer.step()
    trains = [not torch.equal(p, old) for p, old in zip(engine.model.parameters(), before)]
    assert all(trains), f"{trains.count(False)} parameters of {len(trains)} no longer train"
    return ""


def test_an_optimizer_that_shards_its_state_is_refused_or_trains_on(ranks: Ranks) -> None:
    """It holds the parameters in places of its own, where the draw does not find them."""
    for refusal in ranks(2, _train_with_sharded_state):
        assert refusal == "" or "ZeroRedundancyOptimizer" in refusal
