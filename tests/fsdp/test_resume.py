"""A sharded run that is broken off and resumed on as many ranks ends the same, to the bit.

Every rank saves its shards of the weights; the optimizer's state goes through rank zero, whole.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.fsdp.row import ROWS
from tests.fsdp.trainee import Trainee, full
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.resuming import Course
from tests.settings import at_once
from worm_dist import WormConfig


class _Saving(Trainee):
    def save(self) -> Any:
        engine = self.engine.state_dict()
        weights = {
            name: full(value) if isinstance(value, Tensor) else value
            for name, value in self.engine.model.state_dict().items()
        }
        return {
            "engine": engine,
            "network": copy.deepcopy(weights),
            "optimizer": _from_rank_zero(self.engine.optimizer_state()),
        }

    def load(self, state: Any) -> None:
        self.engine.load_state_dict(state["engine"])
        here = self.engine.model.state_dict()
        self.engine.model.load_state_dict(
            {
                name: distribute_tensor(value, here[name].device_mesh, here[name].placements)
                if isinstance(here[name], DTensor)
                else value
                for name, value in state["network"].items()
            }
        )
        self.engine.load_optimizer_state(state["optimizer"])


def _from_rank_zero(state: Any) -> Any:
    assert (state is None) == (dist.get_rank() != 0)
    file = io.BytesIO()
    torch.save(state, file)
    content = [file.getvalue()]
    dist.broadcast_object_list(content)
    return torch.load(io.BytesIO(content[0]), weights_only=True)


def _truncate(*dropped: int) -> Any:
    return lambda t: t.engine.truncate(mask_dropping(t.engine.groups, *dropped))


def _draw(*dropped: int) -> Any:
    return lambda t: t.engine.draw(mask_dropping(t.engine.groups, *dropped))


def _broken_off(row: str, saved_at: list[int]) -> list[str]:
    events = {1: _truncate(0, 3, 9), 3: _truncate(0, 3, 9, 12), 8: _draw(0, 3, 9, 12)}
    course = Course(num_steps=10, events=events, saved_at=saved_at)
    config = WormConfig(
        search={"every": "2ba", "l1": 0.01},
        truncation={**at_once(3), "frozen_weights": "remove"},
        ticket={"recalibrate_batches": 3},
    )
    return course.resumed(lambda: _Saving(ROWS[row], config))


@pytest.mark.parametrize(
    ("row", "saved_at"),
    [
        ("one unit, AdamW", [2, 7, 9]),  # in a fade, once columns have left, and after the draw
        pytest.param("compiled network", [9], marks=pytest.mark.slow("compiles networks")),
        pytest.param("compiled around", [2, 9], marks=pytest.mark.slow("compiles networks")),
    ],
)
def test_broken_off_anywhere_it_ends_the_same(ranks: Ranks, row: str, saved_at: list[int]) -> None:
    outcomes = ranks.outcomes(2, _broken_off, row, saved_at, group_timeout=120)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
        found = outcome.value
        assert not found, "\n".join(found[:20])
