from __future__ import annotations

from typing import Any

import pytest
import torch

from worm_dist import ConfigError, Mask


def _mask(**kept: list[int]) -> Mask:
    return Mask({name: torch.tensor(flags, dtype=torch.bool) for name, flags in kept.items()})


def test_reads_like_a_mapping_of_groups() -> None:
    mask = _mask(a=[1, 0], b=[0, 1, 1])
    assert list(mask) == ["a", "b"] and len(mask) == 2
    assert mask["b"].tolist() == [False, True, True]
    assert mask.keep.tolist() == [True, False, False, True, True]
    assert (mask.num_channels, mask.num_kept) == (5, 3)
    assert mask.sizes == {"a": 2, "b": 3}


def test_is_made_of_copies() -> None:
    given = torch.tensor([True, False])
    mask = Mask({"only": given})
    given[0] = False
    mask["only"][0] = False
    assert mask["only"].tolist() == [True, False]


def test_equal_bits_in_equal_groups_are_equal_masks() -> None:
    assert _mask(a=[1, 0], b=[1]) == _mask(a=[1, 0], b=[1])
    assert hash(_mask(a=[1, 0], b=[1])) == hash(_mask(a=[1, 0], b=[1]))
    for other in (
        _mask(a=[0, 1], b=[1]),
        _mask(a=[1, 0], c=[1]),
        _mask(a=[1], b=[0, 1]),
        _mask(b=[1], a=[1, 0]),
    ):
        assert _mask(a=[1, 0], b=[1]) != other
        assert _mask(a=[1, 0], b=[1]).digest != other.digest


def test_distance_is_the_share_of_channels_that_differ() -> None:
    assert _mask(a=[1, 0], b=[1, 1]).distance(_mask(a=[0, 1], b=[1, 1])) == 0.5
    assert _mask(a=[1, 0]).distance(_mask(a=[1, 0])) == 0


def test_masks_over_different_groups_have_no_distance() -> None:
    with pytest.raises(ConfigError, match="different groups"):
        _mask(a=[1, 0]).distance(_mask(b=[1, 0]))


@pytest.mark.parametrize(
    "keep",
    [
        {},
        {"a": torch.ones(2)},
        {"a": torch.ones(2, 2, dtype=torch.bool)},
        {"a": torch.ones(0, dtype=torch.bool)},
        {"a": [True, False]},
    ],
)
def test_only_bool_vectors_make_a_mask(keep: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^mask: "):
        Mask(keep)


def test_vector_is_split_by_sizes() -> None:
    mask = Mask.from_vector({"a": 1, "b": 2}, torch.tensor([True, False, True]))
    assert mask == _mask(a=[1], b=[0, 1])


def test_masks_over_the_same_groups_in_another_order_have_no_distance() -> None:
    one, two = torch.tensor([True, False]), torch.tensor([False, True])
    with pytest.raises(ConfigError, match="different groups"):
        Mask({"a": one, "b": two}).distance(Mask({"b": two, "a": one}))
