from __future__ import annotations

import pytest

from worm_dist.planning.formatting import column, column_widths, listed, seconds, short, shortened


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (9_999, "10.0k"),
        (99_949, "99.9k"),
        (99_951, "100k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (11_173_962, "11.2M"),
        (1_110_845_440, "1.11G"),
        (2**63, "9.22E"),
    ],
)
def test_numbers_have_three_digits(value: int, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.0 ms"), (1.5e-5, "15 us"), (0.0626, "62.6 ms"), (1.78, "1.78 s"), (4321, "4,321.00 s")],
)
def test_seconds_have_a_unit(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (40, "features.denseblock4.denselayer16.conv1"),
        (32, "f.denseblock4.denselayer16.conv1"),
        (31, "f.d4.denselayer16.conv1"),
        (22, "f.d4.d16.conv1"),
        (14, "f.d4.d16.conv1"),
        (13, "..4.d16.conv1"),
        (5, "..nv1"),
    ],
)
def test_names_shrink_from_their_outer_parts(width: int, text: str) -> None:
    assert shortened("features.denseblock4.denselayer16.conv1", width) == text
    assert len(text) <= width


def test_names_that_differ_in_their_numbers_still_differ() -> None:
    names = [f"block{b}.layer{n}.conv{c}" for b in range(12) for n in range(12) for c in (1, 2)]
    assert len({shortened(name, 14) for name in names}) == len(names)


def test_many_are_listed_as_the_first_and_their_number() -> None:
    assert listed([], 9) == "-"
    assert listed(["conv1"], 9) == "conv1"
    assert listed(["conv1", "conv2", "conv3"], 9) == "conv1 +2"
    assert listed(["layer1.conv1", "conv2"], 11) == "l1.conv1 +1"


def test_names_in_a_column_shrink_alike_as_long_as_they_can() -> None:
    cells = [["block1.layer2.conv"], ["stem.conv", "stem.other"], []]
    assert column(cells, 18) == ["block1.layer2.conv", "stem.conv +1", "-"]
    assert column(cells, 17) == ["b1.layer2.conv", "s.conv +1", "-"]
    assert column(cells, 10) == ["b1.l2.conv", "s.conv +1", "-"]
    assert column(cells, 9) == ["..l2.conv", "s.conv +1", "-"]
    assert column([], 9) == []


def test_room_goes_to_those_that_need_it() -> None:
    assert column_widths([5, 40, 9], 30) == [5, 16, 9]
    assert column_widths([20, 20, 20], 30) == [10, 10, 10]
    assert column_widths([3, 4], 30) == [3, 4]
