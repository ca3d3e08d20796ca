from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nets import Plain
from worm_dist import CheckpointError, ConfigError, Mask, WormConfig
from worm_dist.digest import sha256_of
from worm_dist.groups.channel_groups import Groups
from worm_dist.groups.tracing import find_groups
from worm_dist.models import build_model
from worm_dist.planning.hypothetical import mask_of_ticket
from worm_dist.search.equal_shares import equal_shares
from worm_dist.search.ranking import Ranking

_NETWORKS = {
    "vgg_small": build_model("vgg_small", 10, 3),
    "resnet20": build_model("resnet20", 10, 3),
}
_GROUPS = {
    name: find_groups(network, torch.zeros(1, 3, 8, 8)) for name, network in _NETWORKS.items()
}


def _shared(name: str, round_to: int = 1, **search: Any) -> tuple[Mask, dict[str, int]]:
    """The mask, and how many channels each group loses."""
    config = WormConfig(search={"threshold": "global", **search}, ticket={"round_to": round_to})
    ranking = Ranking(config, _NETWORKS[name], _GROUPS[name], None)
    mask = equal_shares(ranking, _GROUPS[name])
    return mask, {group: int((~kept).sum()) for group, kept in mask.items()}


@pytest.mark.parametrize("name", list(_NETWORKS))
@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.5, 0.77, 0.9])
def test_the_share_is_exact_and_about_the_same_in_every_group(name: str, ratio: float) -> None:
    mask, dropped = _shared(name, prune_ratio=ratio, min_keep_ratio=0.0)
    assert mask.num_channels - mask.num_kept == int(round(ratio * mask.num_channels, 9))
    for group, size in mask.sizes.items():
        assert abs(dropped[group] - ratio * size) <= 1
        # Ranks that hold the first and the last channels lose about as many.
        assert abs(int((~mask[group])[: size // 2].sum()) - dropped[group] / 2) <= size**0.5 / 2


def test_rounding_keeps_the_total_and_comes_close_to_the_share() -> None:
    mask, dropped = _shared("vgg_small", round_to=8, prune_ratio=0.3)
    assert all((size - dropped[n]) % 8 == 0 for n, size in mask.sizes.items() if size > 32)
    assert abs(sum(dropped.values()) - int(0.3 * mask.num_channels)) <= 4
    assert all(abs(dropped[name] - 0.3 * size) <= 8 for name, size in mask.sizes.items())


def test_ratios_of_single_groups_hold() -> None:
    mask, dropped = _shared("vgg_small", prune_ratio=0.25, ratios={"features.?": 0.75})
    shares = {name: dropped[name] / size for name, size in mask.sizes.items()}
    assert shares == {name: 0.75 if len(name) == 10 else 0.25 for name in shares}


def test_a_share_that_the_floor_does_not_leave_is_refused() -> None:
    """Every group keeps a tenth, rounded up: nine tenths of all are more than may go."""
    with pytest.raises(
        ConfigError, match=r"search\.min_keep_ratio: 0\.1 protects so many channels"
    ):
        _shared("vgg_small", prune_ratio=0.9)


def test_ranked_norm_by_norm_a_group_loses_what_its_norms_agree_on() -> None:
    by_norm, dropped = _shared("resnet20", prune_ratio=0.5, grouping="layer")
    assert all(2 * dropped[name] == size for name, size in by_norm.sizes.items())


@pytest.fixture
def groups() -> Groups:
    return find_groups(Plain(), torch.zeros(1, 3, 8, 8))


def _write(folder: Path, keep: dict[str, list[bool]], **changes: Any) -> Mask:
    mask = Mask({name: torch.tensor(kept) for name, kept in keep.items()})
    parts = [
        {
            "name": name,
            "num_channels": len(kept),
            "kept": [place for place, flag in enumerate(kept) if flag],
        }
        for name, kept in keep.items()
    ]
    content = {
        "format_version": 4,
        "model": None,
        "mask_digest": mask.digest,
        "groups": parts,
        "cuts": [],
        "weights": {"size": 0, "sha256": "0" * 64},
        "versions": {},
        **changes,
    }
    digest = sha256_of([json.dumps(content, sort_keys=True).encode()])
    (folder / "ticket.json").write_text(json.dumps({**content, "digest": digest}))
    return mask


def test_a_ticket_says_what_it_was_drawn_with(tmp_path: Path, groups: Groups) -> None:
    mask = _write(tmp_path, {"conv1": [True, False] * 3, "conv2": [False, True] * 4})
    assert mask_of_ticket(tmp_path, groups) == mask


def test_a_ticket_of_another_network_is_refused(tmp_path: Path, groups: Groups) -> None:
    _write(tmp_path, {"conv1": [True, False] * 3, "conv2": [False, True] * 5})
    with pytest.raises(ConfigError, match="drawn from another network: group conv2 differ"):
        mask_of_ticket(tmp_path, groups)


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": [{"name": "conv1", "num_channels": 2, "kept": [2]}]},
        {"groups": [{"name": "conv1", "num_channels": -2, "kept": []}]},
        {"groups": 5},
        {"groups": [{"name": "conv1", "num_channels": 2, "kept": []}]},
        {"versions": None},
    ],
)
def test_a_damaged_ticket_is_refused(
    changes: dict[str, Any], tmp_path: Path, groups: Groups
) -> None:
    _write(tmp_path, {"conv1": [True, False] * 3, "conv2": [False, True] * 4}, **changes)
    with pytest.raises(CheckpointError, match=r"ticket\.json: "):
        mask_of_ticket(tmp_path, groups)


def test_what_is_no_ticket_is_refused(tmp_path: Path, groups: Groups) -> None:
    with pytest.raises(CheckpointError, match="is this the folder of a ticket"):
        mask_of_ticket(tmp_path, groups)
    (tmp_path / "ticket.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="not a ticket"):
        mask_of_ticket(tmp_path, groups)
