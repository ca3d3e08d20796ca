"""When which of the dropped channels begins to leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worm_dist.truncation.removal_schedule import RemovalSchedule


def _begins(schedule: RemovalSchedule, steps: range) -> dict[int, list[int]]:
    """The channels that begin after each step."""
    return {step: schedule.begin(step).tolist() for step in steps if schedule.is_due(step)}


def test_many_leave_at_first_and_fewer_later() -> None:
    """Of eight channels over five fades: 1 - (4/5)^3 of them at once, and so on."""
    schedule = RemovalSchedule(fade_steps=2)
    schedule.start(torch.arange(8) * 10, step=100, duration=10)
    assert _begins(schedule, range(100, 120)) == {
        100: [0, 10, 20, 30],
        102: [40, 50],
        104: [60],
        106: [70],
    }
    assert not schedule.waiting.numel()


@given(
    num_channels=st.integers(1, 300),
    fade_steps=st.integers(1, 50),
    duration=st.integers(1, 6000),
    pauses=st.lists(st.integers(0, 6000), max_size=4),
)
def test_all_leave_in_order_and_in_time(
    num_channels: int, fade_steps: int, duration: int, pauses: list[int]
) -> None:
    schedule = RemovalSchedule(fade_steps)
    schedule.start(torch.arange(num_channels), 7, duration)
    seen: list[int] = []
    last = step = 7
    while schedule.waiting.numel():
        if schedule.is_due(step):
            if pauses and step - 7 >= pauses[0]:
                pauses.pop(0)
                schedule.pause(fade_steps)
            else:
                begin = schedule.begin(step).tolist()
                assert begin
                seen += begin
                last = step
        step += 1
        assert step < 20_000
    assert seen == list(range(num_channels))
    if not pauses:
        slowest = 7 + max(0, duration - fade_steps) + 4 * fade_steps
        assert last <= slowest


def test_a_state_goes_on_in_the_middle() -> None:
    one, other = RemovalSchedule(3), RemovalSchedule(3)
    one.start(torch.arange(40), 5, 60)
    first = _begins(one, range(5, 20))
    other.load_state_dict(one.state_dict())
    assert first
    assert _begins(one, range(20, 80)) == _begins(other, range(20, 80)) != {}


def test_what_is_stopped_leaves_no_more() -> None:
    schedule = RemovalSchedule(2)
    schedule.start(torch.arange(9), 0, 20)
    _begins(schedule, range(4))
    schedule.stop()
    assert _begins(schedule, range(4, 40)) == {}


@pytest.mark.parametrize("duration", [1, 3, 4])
def test_one_fade_is_the_shortest_removal(duration: int) -> None:
    schedule = RemovalSchedule(4)
    schedule.start(torch.arange(9), 0, duration)
    assert _begins(schedule, range(9)) == {0: list(range(9))}
