"""No rank is left alone in a check or a draw: who goes past a call is told, and so is who waits."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import Store
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import BackendError, WormConfig
from worm_dist.distributed import attendance
from worm_dist.engine.engine import Engine

_STEPS = 2
"""Of an epoch."""


def _engine(**settings: Any) -> Engine:
    torch.manual_seed(0)
    model = DistributedDataParallel(Plain())
    return worm_dist.attach(
        model,
        SGD(model.parameters(), lr=0.01),
        WormConfig(**settings),
        example_inputs=random_images(1),
        steps_per_epoch=_STEPS,
    )


def _backward(engine: Engine) -> None:
    loss = engine.model(random_images(4, seed=dist.get_rank())).square().mean()
    (loss + engine.penalty()).backward()


def _step(engine: Engine) -> None:
    _backward(engine)
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def _check_on(only: int, first: int) -> str:
    """A loop that checks on one rank only; the other comes to its next pass later, or earlier."""
    engine = _engine()
    meeting = dist.distributed_c10d._get_default_store()
    for _ in range(_STEPS):
        _step(engine)
    is_first = dist.get_rank() == first
    if not is_first:
        meeting.wait(["there"])
    try:
        if is_first:
            engine.model.register_forward_pre_hook(lambda *_: meeting.set("there", ""))
            _tell_when_present(meeting)
        if dist.get_rank() == only:
            engine.check()
        else:
            _step(engine)
    except BackendError as error:
        return str(error)
    except RuntimeError:
        return "torch's own"
    return "nothing"


def _tell_when_present(meeting: Store) -> None:
    """When the marks of a check have been left, not before."""

    def told(store: Store, call: str) -> None:
        meeting.set("there", "")
        require(store, call)

    require = attendance._require_not_skipped
    vars(attendance)["_require_not_skipped"] = told


@pytest.mark.fault(50, "a check on one rank only, before or after the other one's next pass")
@pytest.mark.parametrize("only", [0, 1])
def test_a_check_on_one_rank_is_told_to_it_and_to_the_others(ranks: Ranks, only: int) -> None:
    """Scores met gradients in one collective: half an hour of silence, or sums of unlike things."""
    waited = ranks(2, _check_on, only, only)
    assert f"rank {1 - only} has begun the next pass without calling it" in waited[only]
    assert "check at step 2: other ranks are in it" in waited[1 - only]


@pytest.mark.fault(50, "a check on one rank only, before or after the other one's next pass")
@pytest.mark.parametrize("only", [0, 1])
def test_a_check_that_comes_too_late_is_refused(ranks: Ranks, only: int) -> None:
    """The other rank is in its backward pass by then; only torch can say that this has ended."""
    waited = ranks(2, _check_on, only, 1 - only)
    assert f"check at step 2: rank {1 - only} has begun the next pass" in waited[only]
    assert waited[1 - only] == "torch's own"


def _draw_on(only: int) -> str:
    engine = _engine(truncation=at_once(1))
    _step(engine)
    engine.truncate(mask_dropping(engine.groups, 0, 7))
    _step(engine)
    assert engine.check().ticket
    try:
        if dist.get_rank() == only:
            engine.draw()
        else:
            _step(engine)
    except BackendError as error:
        return str(error)
    except RuntimeError:
        return "torch's own"
    return "nothing"


@pytest.mark.fault(50, "a draw on one rank only")
def test_a_draw_on_one_rank_is_told(ranks: Ranks) -> None:
    told = ranks(2, _draw_on, 0)
    assert any("draw at step 2: " in line for line in told)
    assert "nothing" not in told


def _skip_a_step() -> str:
    """A loop in which rank one goes past a step of the optimizer, as after a loss that is odd."""
    engine = _engine(truncation=at_once(1))
    _step(engine)
    engine.truncate(mask_dropping(engine.groups, 0, 7))
    dist.set_timeout(timedelta(seconds=3))  # for the start it may be short of time
    try:
        for number in range(4):
            if dist.get_rank() == 1 and number == 2:
                _backward(engine)
                engine.optimizer.zero_grad()
                continue
            _step(engine)
            engine.check()
    except BackendError as error:
        return str(error)
    except RuntimeError:
        return "torch's own"
    return "nothing"


@pytest.mark.slow("waits for the group's timeout of three seconds")
@pytest.mark.fault(50, "a rank skips a step while truncated, and does not know of a check")
def test_a_rank_that_has_skipped_a_step_is_named(ranks: Ranks) -> None:
    """The check was not due there yet, so it went on to its next pass, and nobody was named: its
    gradients met the scores of the others, in one collective."""
    first, second = ranks.outcomes(2, _skip_a_step)
    assert "rank 1 has not come to it within 3" in str(first.value), first
    assert "every rank must take every step" in first.value
    assert second.value == "torch's own"
    assert first.seconds < 15


class _Adversary(nn.Module):
    """Makes what a discriminator judges."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.zeros(4, 3, 8, 8))


def _unusual_loops(how: str) -> tuple[int, str]:
    """Checks where one would not expect them, on all ranks alike."""
    engine = _engine()
    adversary = _Adversary()
    for _ in range(8):
        if how == "check before the step":
            _backward(engine)
            engine.check()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
            continue
        _step(engine)
        if how == "discriminator":
            engine.model(adversary.noise).mean().backward()
            engine.optimizer.zero_grad()
            engine.check()
        elif how == "seldom" and engine.step % 4 == 0:
            engine.check()
    return len(engine.history), engine.phase.name


@pytest.mark.parametrize(
    ("how", "checks"), [("check before the step", 3), ("discriminator", 3), ("seldom", 2)]
)
def test_all_ranks_may_check_where_they_like(ranks: Ranks, how: str, checks: int) -> None:
    told = ranks(2, _unusual_loops, how)
    assert told[0][0] >= checks
    assert told[0][1] == told[1][1]


def _num_keys_after_checks() -> list[int]:
    engine = _engine()
    store = dist.distributed_c10d._get_default_store()
    found = []
    for _ in range(6):
        for _ in range(_STEPS):
            _step(engine)
        engine.check()
        dist.barrier()
        found.append(store.num_keys())
        dist.barrier()
    return found


def test_the_marks_of_earlier_checks_are_deleted(ranks: Ranks) -> None:
    """A store would else keep some keys for each rank and check: millions in a long run."""
    for found in ranks(2, _num_keys_after_checks):
        assert found[2:] == found[1:2] * 4, found
