from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nets import Residual, random_images
from worm_dist import ConfigError, add_gates
from worm_dist.config import SearchConfig
from worm_dist.groups.channel_groups import Groups
from worm_dist.pruning.exactness import find_drawable_groups


class _Mixed(nn.Module):
    """A convolution with a norm, one without, and a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 6, 3)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, dropout=0, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        inner = torch.relu(self.bare(torch.relu(self.norm(self.stem(images)))))
        logits: Tensor = self.head(self.encoder(inner.flatten(2).transpose(1, 2)).mean(dim=1))
        return logits


def _groups(**search: Any) -> Groups:
    network = add_gates(_Mixed())
    return find_drawable_groups(network, random_images(1), SearchConfig(**search))


@pytest.mark.parametrize(
    ("score", "names"),
    [
        ("auto", ["stem", "encoder.self_attn", "encoder.linear1"]),
        ("norm_scale", ["stem"]),
        ("gate", ["encoder.self_attn", "encoder.linear1"]),
        ("weight_norm", ["stem", "encoder.self_attn", "encoder.linear1"]),
    ],
)
def test_a_score_ranks_the_groups_that_have_what_it_reads(score: str, names: list[str]) -> None:
    groups = _groups(importance=score)
    assert [group.name for group in groups] == names
    left = {"norm", "encoder.self_attn", "encoder.linear1"} - set(names)
    assert left - {"norm"} <= groups.dense.keys()


def test_a_residual_stream_may_stay_dense() -> None:
    groups = find_drawable_groups(Residual(), random_images(1), SearchConfig(coupling="skip"))
    assert [group.name for group in groups] == ["conv1"]
    reason = "a sum ties it to other layers, and search.coupling is 'skip'"
    assert groups.dense == {"bn0": reason, "bn2": reason}


@pytest.mark.parametrize("pattern", ["conv1", "*1", "bn1"])
def test_what_the_settings_call_dense_stays_dense(pattern: str) -> None:
    groups = find_drawable_groups(Residual(), random_images(1), SearchConfig(dense=[pattern]))
    assert [group.name for group in groups] == ["stem"]
    assert groups.dense["bn1"] == f"search.dense has {pattern!r}"


def test_a_pattern_without_effect_is_told_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"search\.dense: 'cnov1' .*did you mean conv1\?"):
        find_drawable_groups(Residual(), random_images(1), SearchConfig(dense=["cnov1"]))
