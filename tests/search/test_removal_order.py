"""Which of the dropped channels leave first."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from worm_dist.search.removal_order import removal_order


def test_longest_dropped_first_then_the_least_important_then_by_number() -> None:
    dropped = torch.tensor([True, False, True, True, True, True])
    checks_dropped = torch.tensor([1, 0, 3, 1, 3, 1])
    importance = torch.tensor([0.2, 0.0, 0.9, 0.1, 0.4, 0.1])
    assert removal_order(dropped, checks_dropped, importance).tolist() == [4, 2, 3, 5, 0]


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=1
    )
)
def test_the_order_is_that_of_sorting_by_all_three_keys(
    channels: list[tuple[bool, int, float]],
) -> None:
    dropped, checks, importance = map(list, zip(*channels))
    expected = sorted(
        (number for number, (is_dropped, *_) in enumerate(channels) if is_dropped),
        key=lambda number: (-checks[number], importance[number], number),
    )
    order = removal_order(
        torch.tensor(dropped), torch.tensor(checks), torch.tensor(importance, dtype=torch.float32)
    )
    assert order.tolist() == expected
