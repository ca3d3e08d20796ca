from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.nets import (
    Concatenating,
    Flattening,
    Plain,
    Residual,
    Separable,
    Upsampling,
    random_images,
)
from worm_dist import ConfigError
from worm_dist.config import SearchConfig
from worm_dist.groups.channel_groups import ChannelGroup, Groups, Member
from worm_dist.models import build_model
from worm_dist.pruning.exactness import find_drawable_groups as find_groups


def _groups(network: nn.Module) -> Groups:
    return find_groups(network, random_images(1))


def _roles(group: ChannelGroup) -> list[tuple[str, str]]:
    return [(member.module, member.role) for member in group.members]


def _member(group: ChannelGroup, module: str) -> Member:
    return next(member for member in group.members if member.module == module)


def test_a_plain_network_has_a_group_for_every_convolution() -> None:
    first, second = _groups(Plain())
    assert (first.name, first.num_channels) == ("conv1", 6)
    assert _roles(first) == [("conv1", "producer"), ("bn1", "norm"), ("conv2", "consumer")]
    assert _roles(second) == [("conv2", "producer"), ("bn2", "norm"), ("head", "consumer")]
    assert _member(first, "conv1").parameters == (("conv1.weight", 0), ("conv1.bias", 0))
    assert _member(first, "bn1").parameters == (("bn1.weight", 0), ("bn1.bias", 0))
    assert _member(first, "conv2").parameters == (("conv2.weight", 1),)
    assert _member(second, "head").parameters == (("head.weight", 1),)
    assert _member(first, "conv2").positions.tolist() == [[0], [1], [2], [3], [4], [5]]


def test_a_residual_sum_ties_filters_together() -> None:
    tied, inner = _groups(Residual())
    assert _roles(tied) == [
        ("stem", "producer"),
        ("bn0", "norm"),
        ("conv1", "consumer"),
        ("conv2", "producer"),
        ("bn2", "norm"),
        ("head", "consumer"),
    ]
    assert [norm.module for norm in tied.norms] == ["bn0", "bn2"]
    assert _roles(inner) == [("conv1", "producer"), ("bn1", "norm"), ("conv2", "consumer")]


def test_a_resnet_has_one_group_for_each_stage_and_one_in_each_block() -> None:
    network = build_model("resnet20", 10, 3)
    groups = find_groups(network, torch.randn(1, 3, 32, 32))
    norms = {name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(groups) == 3 + 9
    assert {norm.module for group in groups for norm in group.norms} == norms
    assert groups.dense == {}
    assert groups.num_channels == (16 + 32 + 64) * 4
    # The stem and the second convolutions of the first stage's blocks; the next stage reads them.
    assert [norm.module for norm in groups[0].norms] == [
        "bn1",
        "stages.0.0.bn2",
        "stages.0.1.bn2",
        "stages.0.2.bn2",
    ]
    assert _member(groups[0], "stages.1.0.shortcut.0").role == "consumer"


def test_behind_a_flatten_a_channel_is_a_run_of_inputs() -> None:
    convolution, hidden = _groups(Flattening(width=6, side=4))
    positions = _member(convolution, "hidden").positions
    assert torch.equal(positions, torch.arange(96).view(6, 16))
    assert hidden.num_channels == 12 and _roles(hidden)[1] == ("bn_hidden", "norm")


def test_a_depthwise_convolution_lives_with_the_channels_it_passes_on() -> None:
    wide, projected = _groups(Separable())
    assert _roles(wide) == [
        ("expand", "producer"),
        ("bn1", "norm"),
        ("depthwise", "producer"),
        ("bn2", "norm"),
        ("project", "consumer"),
    ]
    assert _member(wide, "depthwise").parameters == (("depthwise.weight", 0),)
    assert projected.name == "project"


def test_behind_a_concatenation_indices_are_shifted() -> None:
    first, second, _ = _groups(Concatenating())
    assert _member(first, "conv3").positions.flatten().tolist() == [0, 1, 2, 3]
    assert _member(second, "conv3").positions.flatten().tolist() == [4, 5, 6, 7, 8, 9]


def test_a_transposed_convolution_has_its_inputs_first() -> None:
    first, second = _groups(Upsampling())
    assert _member(first, "up").parameters == (("up.weight", 0),)
    assert _member(second, "up").parameters == (("up.weight", 1), ("up.bias", 0))


def test_synchronised_norms_are_norms() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(Plain())
    assert [group.name for group in _groups(network)] == ["conv1", "conv2"]


class _LeftDense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.bn1 = nn.BatchNorm2d(6)
        self.other = nn.GroupNorm(2, 6)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.bn2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.conv3 = nn.Conv2d(8, 5, 1)
        self.bn3 = nn.BatchNorm2d(5)
        self.conv4 = nn.Conv2d(5, 7, 1)
        self.bn4 = nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 10)
        self.bn3.weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        images = self.other(self.bn1(self.conv1(images)))
        images = self.grouped(torch.relu(self.bn2(self.conv2(images))))
        images = torch.relu(self.bn3(self.conv3(images)))
        logits: Tensor = self.head(torch.relu(self.bn4(self.conv4(images))).mean(dim=(2, 3)))
        return logits


def test_what_is_not_understood_is_left_dense_with_a_reason() -> None:
    groups = _groups(_LeftDense())
    assert [group.name for group in groups] == ["conv2", "conv4"]
    assert groups.dense == {
        "bn1": "coupled with other (GroupNorm), which is not supported",
        "other": "GroupNorm: of all norms only BatchNorm's channels are dropped",
        "bn3": "bn3 has no scale that trains",
        "grouped": "it has neither a norm nor a gate; search.importance 'weight_norm' ranks it "
        "without",
    }


def test_a_network_without_scales_is_refused_where_only_they_count() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    kinds: list[tuple[Literal["norm_scale", "gate"], str]]
    kinds = [("norm_scale", "BatchNorm"), ("gate", "gate")]
    for importance, what in kinds:
        search = SearchConfig(importance=importance)
        with pytest.raises(ConfigError, match=rf"^model: it has no channel group with a {what}"):
            find_groups(network, random_images(1), search)
    assert find_groups(network, random_images(1)).sizes == {"0": 4}


def test_inputs_that_do_not_fit_are_refused_with_the_cause() -> None:
    with pytest.raises(
        ConfigError, match=r"does not run on the example inputs: RuntimeError: .*5 channels"
    ):
        find_groups(Plain(), random_images(1, channels=5))


@pytest.mark.parametrize(
    "inputs",
    [random_images(1), (random_images(1),), [random_images(1)], {"images": random_images(1)}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_inputs_may_come_as_tensor_sequence_or_keywords(inputs: object) -> None:
    assert len(find_groups(Plain(), inputs)) == 2


def test_tracing_leaves_no_trace() -> None:
    network = Flattening()
    network.bn.eval()
    network.hidden.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    trains = {name: p.requires_grad for name, p in network.named_parameters()}
    modes = {name: m.training for name, m in network.named_modules()}
    random = torch.get_rng_state()

    _groups(network)

    assert torch.equal(torch.get_rng_state(), random)
    assert {name: m.training for name, m in network.named_modules()} == modes
    assert {name: p.requires_grad for name, p in network.named_parameters()} == trains
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_digests_are_equal_for_equal_structures_only() -> None:
    same = _groups(Plain()).digests
    assert _groups(Plain()).digests == same
    wider = _groups(Plain(first=7)).digests
    assert wider["conv1"] != same["conv1"] and wider["conv2"] == same["conv2"]
