"""Drawing is exact: the smaller network computes what the masked dense one does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchvision.models import DenseNet

import worm_dist
from tests.nets import (
    Concatenating,
    Flattening,
    Plain,
    Residual,
    Separable,
    Upsampling,
    random_images,
    randomise,
)
from tests.oracles import mask_dropping
from tests.settings import at_once
from worm_dist import ConfigError, Mask, WormConfig
from worm_dist.groups.channel_groups import Groups
from worm_dist.models import build_model
from worm_dist.models.preresnet import PreResNet
from worm_dist.pruning.exactness import find_drawable_groups as find_groups
from worm_dist.pruning.surgery import cuts_of, remove_channels, shapes_of
from worm_dist.search.importance import ChannelScales
from worm_dist.search.select import select_channels

pytestmark = pytest.mark.slow("draws of whole families, a third of a minute")

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg_small": lambda: build_model("vgg_small", 10, 3, {"widths": [16, "M", 24, 32]}),
    "resnet20": lambda: build_model("resnet20", 10, 3),
    "preresnet": lambda: PreResNet(10, 3, 8, (4, 6), 1),
    "flattening": Flattening,
    "separable": Separable,
    "concatenating": Concatenating,
    "upsampling": Upsampling,
    "residual": Residual,
    "mobilenet_v2": lambda: build_model("mobilenet_v2", 10, 3),
    "densenet": lambda: DenseNet(8, (2, 2), 16, num_classes=10),
    "mobilenet_v3": lambda: build_model("mobilenet_v3_small", 10, 3),
}


def _network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    randomise(network, seed)
    return network.eval()


def _masked(network: nn.Module, groups: Groups, mask: Mask) -> nn.Module:
    """The dense network with zero scale and shift on dropped channels."""
    masked = copy.deepcopy(network)
    with torch.no_grad():
        for group in groups:
            for norm in group.norms:
                for name, _ in norm.parameters:
                    places = norm.positions[~mask[group.name]].flatten()
                    masked.get_parameter(name)[places] = 0
    return masked


def _search_mask(network: nn.Module, groups: Groups, ratio: float) -> Mask:
    return select_channels(ChannelScales(network, groups)(), groups.sizes, ratio, 0.1)[0]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_masked_dense_network(name: str, seed: int, ratio: float) -> None:
    network = _network(name, seed)
    images = random_images(4, side=32, seed=seed)
    groups = find_groups(network, images[:1])
    mask = _search_mask(network, groups, ratio)
    masked = _masked(network, groups, mask)
    with torch.no_grad():
        expected = masked(images)
        remove_channels(network, cuts_of(groups, mask, shapes_of(network)))
        got = network(images)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(norm.num_features < 32 for norm in norms)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_shrinks_to_what_the_mask_keeps(name: str) -> None:
    network = _network(name, seed=0)
    groups = find_groups(network, random_images(1, side=32))
    mask = _search_mask(network, groups, 0.5)
    sizes = {key: p.shape for key, p in network.named_parameters()}
    remove_channels(network, cuts_of(groups, mask, shapes_of(network)))
    # A norm behind a concatenation is in several groups.
    left = {norm.module: sizes[f"{norm.module}.weight"][0] for g in groups for norm in g.norms}
    for group in groups:
        for norm in group.norms:
            left[norm.module] -= norm.positions[~mask[group.name]].numel()
    for name_of_norm, num_features in left.items():
        module = network.get_submodule(name_of_norm)
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert module.num_features == module.weight.numel() == num_features
    touched = {name for group in groups for m in group.members for name, _ in m.parameters}
    for key, parameter in network.named_parameters():
        if key not in touched:
            assert parameter.shape == sizes[key], key
    # It still trains.
    network.train()
    network(random_images(2, side=32)).sum().backward()


def test_a_mask_that_keeps_everything_cuts_nothing() -> None:
    network = Plain()
    groups = find_groups(network, random_images(1))
    assert cuts_of(groups, mask_dropping(groups), shapes_of(network)) == ()


def test_a_group_without_a_survivor_is_refused() -> None:
    network = Plain(first=3)
    groups = find_groups(network, random_images(1))
    with pytest.raises(ConfigError, match="group conv1: the mask keeps none of its 3 channels"):
        cuts_of(groups, mask_dropping(groups, 0, 1, 2), shapes_of(network))


def test_what_does_not_train_does_not_train_after_the_cut() -> None:
    network = Residual()
    network.bn1.bias.requires_grad_(False)
    groups = find_groups(network, random_images(1))
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    remove_channels(network, cuts_of(groups, mask_dropping(groups, 0, 9), shapes_of(network)))
    assert {name: p.requires_grad for name, p in network.named_parameters()} == before


def test_a_faded_network_is_drawn_without_any_jump() -> None:
    """When the fade is complete the masked dense network is the network itself."""
    torch.manual_seed(0)
    network = Residual()
    randomise(network, seed=1)
    config = WormConfig(truncation={**at_once(3)}, ticket={"recalibrate_batches": 0})
    engine = worm_dist.attach(
        network,
        SGD(network.parameters(), lr=0.05, momentum=0.9),
        config,
        example_inputs=random_images(1),
        steps_per_epoch=10,
    )
    engine.truncate(mask_dropping(engine.groups, 0, 3, 9, 12))

    def outputs() -> Tensor:
        engine.model.eval()
        with torch.no_grad():
            logits: Tensor = engine.model(random_images(8, seed=99))
        engine.model.train()
        return logits

    for step in range(5):
        engine.optimizer.zero_grad()
        engine.model(random_images(8, seed=step)).square().mean().backward()
        engine.optimizer.step()
    before = outputs()
    engine.draw(engine.mask)
    assert network.stem.out_channels == 6 and network.conv1.out_channels == 4
    torch.testing.assert_close(outputs(), before, rtol=1e-5, atol=1e-6)
