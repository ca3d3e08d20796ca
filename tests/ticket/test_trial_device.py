"""A trial in double precision takes no large part of a GPU's memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.nets import Plain, random_images
from worm_dist.pruning import rehearsal
from worm_dist.pruning.rehearsal import Rehearsal


def _network(width: int, device: str) -> nn.Module:
    return nn.Linear(width, width, device=device)


def test_a_large_network_on_a_device_is_tried_on_the_cpu_first() -> None:
    """Several copies of 8 bytes a parameter were made on every GPU, beside what training needs."""
    small, large = 1 << 10, 1 << 14
    assert rehearsal._trial_devices(_network(small, "meta")) == [torch.device("meta")]
    assert [device.type for device in rehearsal._trial_devices(_network(large, "meta"))] == [
        *("cpu", "meta")
    ]


def test_where_it_cannot_run_on_the_cpu_it_is_tried_on_its_own_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And in its own precision only if it can run in no other."""
    tried: list[torch.dtype] = []

    class Picky(Plain):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tried.append(images.dtype)
            if len(tried) == 1:
                raise RuntimeError("a tensor of mine is on another device")
            return super().forward(images)

    monkeypatch.setattr(
        rehearsal, "_trial_devices", lambda network: [torch.device("cpu"), torch.device("cpu", 0)]
    )
    network = Picky().eval()
    copy = Rehearsal(network, random_images(1)).network
    assert {parameter.dtype for parameter in copy.parameters()} == {torch.float64}
    assert tried[:2] == [torch.float64, torch.float64]
