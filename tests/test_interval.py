from __future__ import annotations

import pytest

from worm_dist.interval import Interval


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        ("1ep", 1, "ep"),
        ("0.25ep", 0.25, "ep"),
        ("200ba", 200, "ba"),
        ("3.0ba", 3, "ba"),
        ("0.1dur", 0.1, "dur"),
    ],
)
def test_epochs_and_batches_are_read(text: str, count: float, unit: str) -> None:
    assert Interval.parse(text) == Interval(count, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", "1", "ep", "-1ep", "1 ep", "1e2ba", "1.5.2ep", "1epoch", "nanep", 1, 1.5, None]
)
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r'^write epochs as "1ep", steps as "200ba" or a share'):
        Interval.parse(text)


@pytest.mark.parametrize("text", ["0ep", "0ba", "0.0ep"])
def test_an_interval_is_positive(text: str) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Interval.parse(text)


def test_half_a_batch_does_not_exist() -> None:
    with pytest.raises(ValueError, match="must be whole"):
        Interval.parse("0.5ba")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1ep", 30),
        ("0.25ep", 8),
        ("2ep", 60),
        ("7ba", 7),
        ("0.001ep", 1),
        ("0.1dur", 60),
        ("1dur", 600),
        ("0.0001dur", 1),
    ],
)
def test_steps_are_at_least_one(text: str, steps: int) -> None:
    assert Interval.parse(text).steps(steps_per_epoch=30, total_steps=600) == steps


def test_a_length_that_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match="that of an epoch is not"):
        Interval.parse("1ep").steps(None, 600)
    with pytest.raises(ValueError, match="that of the whole training is not"):
        Interval.parse("0.1dur").steps(30, None)
    assert Interval.parse("7ba").steps(None, None) == 7


def test_a_share_is_at_most_the_whole_training() -> None:
    with pytest.raises(ValueError, match="1dur is the whole training"):
        Interval.parse("1.01dur")


@pytest.mark.parametrize("count", ["0.0000001", "1000000001", "9" * 400, "0." + "0" * 400 + "1"])
@pytest.mark.parametrize("unit", ["ep", "ba"])
def test_an_interval_has_a_length_that_can_be_counted(count: str, unit: str) -> None:
    """400 nines of steps ended in an OverflowError: a float of them is infinite."""
    with pytest.raises(ValueError, match=r"must be positive, at least 0\.000001 and"):
        Interval.parse(count + unit)


@pytest.mark.parametrize(
    "text",
    ["1ep", "0.25ep", "200ba", "1234567ba", "0.1234567ep", "0.00001ep", "1000000000ba", "0.25dur"],
)
def test_text_round_trips(text: str) -> None:
    """1234567ba was told as 1.23457e+06ba, another interval, which could not be read either."""
    assert str(Interval.parse(text)) == text
    assert Interval.parse(Interval.parse(text)) == Interval.parse(text)
