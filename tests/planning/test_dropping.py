from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nets import Plain
from worm_dist import CheckpointError, ConfigError, Mask
from worm_dist.planning.dropping import equal_shares, mask_of_ticket
from worm_dist.search.groups import Groups
from worm_dist.search.tracing import find_groups


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [
        (0.5, [50, 4, 1]),
        (0.29, [71, 5, 1]),  # 0.29 * 100 is 28.999999999999996 in floats
        (0.9, [10, 1, 1]),
        (0.9999999999, [1, 1, 1]),
        (0.0, [100, 7, 1]),
    ],
)
def test_each_group_loses_its_share_but_not_its_last_channel(ratio: float, kept: list[int]) -> None:
    mask = equal_shares({"a": 100, "b": 7, "c": 1}, ratio)
    assert [int(mask[name].sum()) for name in mask] == kept


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
    content = {"groups": parts, "mask_digest": mask.digest, "cuts": [], **changes}
    (folder / "ticket.json").write_text(json.dumps(content))
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
        {"groups": []},
        {"groups": [{"name": "conv1", "num_channels": 2, "kept": [2]}]},
        {"groups": [{"name": "conv1", "num_channels": -2, "kept": []}]},
        {"groups": 5},
        {"mask_digest": "00"},
    ],
)
def test_a_damaged_ticket_is_refused(
    changes: dict[str, Any], tmp_path: Path, groups: Groups
) -> None:
    _write(tmp_path, {"conv1": [True, False] * 3, "conv2": [False, True] * 4}, **changes)
    with pytest.raises(CheckpointError, match=r"ticket\.json: "):
        mask_of_ticket(tmp_path, groups)


def test_what_is_no_ticket_is_refused(tmp_path: Path, groups: Groups) -> None:
    with pytest.raises(CheckpointError, match="is it a ticket"):
        mask_of_ticket(tmp_path, groups)
    (tmp_path / "ticket.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match="not a ticket"):
        mask_of_ticket(tmp_path, groups)
