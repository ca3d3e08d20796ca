"""What is held of groups, masks and plans is next to nothing beside the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50, vgg16_bn

from tests.nets import random_images
from worm_dist import Mask
from worm_dist.groups.channel_groups import Groups
from worm_dist.groups.freeze_plan import FreezePlan
from worm_dist.groups.tracing import find_groups


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors together, each memory counted once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _positions(groups: Groups) -> list[Tensor]:
    return [member.positions for group in groups for member in group.members]


@pytest.mark.parametrize(
    ("build", "places_behind_flatten"),
    [(resnet50, 1), (partial(vgg16_bn, init_weights=False), 49)],
    ids=["resnet50", "vgg16_bn"],
)
def test_under_a_hundredth_of_the_parameters(
    build: Callable[[], nn.Module], places_behind_flatten: int
) -> None:
    network = build()
    groups = find_groups(network, random_images(1, side=32))
    assert max(each.shape[1] for each in _positions(groups)) == places_behind_flatten
    every_other = {name: torch.arange(size) % 2 == 0 for name, size in groups.sizes.items()}
    mask = Mask(every_other)
    plan = FreezePlan(network, groups, ~mask.keep, "coupled")
    held = [mask.keep, *_positions(groups)]
    for block in plan.blocks.values():
        held += [*block.live.values(), *block.frozen.values()]
    assert _num_bytes(held) < 0.01 * _num_bytes(network.parameters())


def test_equal_positions_are_one_tensor() -> None:
    """Nearly all are 0, 1, 2, ...; each on its own they took as much as all scales together."""
    groups = find_groups(resnet50(), random_images(1, side=32))
    different = {tuple(each.flatten().tolist()) for each in _positions(groups)}
    assert len({each.data_ptr() for each in _positions(groups)}) == len(different) < 10
