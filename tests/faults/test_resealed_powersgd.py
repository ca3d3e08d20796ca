"""PowerSGD's saved state differs from rank to rank: one that does not fit is refused on all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.resuming import through_a_file
from tests.settings import at_once
from worm_dist import Engine, WormConfig

CHANGES: dict[str, Callable[[Any], object]] = {
    "parameters: not different": lambda averager: averager["buckets"][0]["parameters"].append("x"),
    "error_feedback.conv1.weight: wanted": lambda averager: _errors(averager).update(
        {"conv1.weight": torch.zeros(2, 2)}
    ),
    "error_feedback.conv1.weight: Value error, has NaN": lambda averager: _errors(averager)[
        "conv1.weight"
    ].fill_(math.nan),
    "q.conv1.weight: wanted": lambda averager: averager["buckets"][0]["q"].update(
        {"conv1.weight": torch.zeros(1)}
    ),
    "num_draws: more than num_passes allow": lambda averager: averager.update(num_draws=2**40),
    "buckets: bn0.bias and 10 more: in none of them": lambda averager: averager["buckets"].pop(0),
    "buckets: head.bias": lambda averager: _without(averager, "head.bias"),
    "buckets: bn0.bias and 1": lambda averager: averager["buckets"].clear(),
    "buckets: Field required": lambda averager: averager.pop("buckets"),
}


def _errors(averager: Any) -> Any:
    return averager["buckets"][0]["error_feedback"]


def _without(averager: Any, name: str) -> None:
    """One parameter less, wherever it is in a bucket."""
    for bucket in averager["buckets"]:
        if name in bucket["parameters"]:
            bucket["parameters"].remove(name)
            bucket["error_feedback"].pop(name, None)
            (bucket["q"] or {}).pop(name, None)


def _engine() -> Engine:
    torch.manual_seed(0)
    model = DistributedDataParallel(Residual(width=16), bucket_cap_mb=0.01)
    return worm_dist.attach(
        model,
        SGD(model.parameters(), lr=0.05),
        WormConfig(truncation={**at_once(2), "compression": "powersgd", "compression_rank": 1}),
        example_inputs=random_images(1),
        steps_per_epoch=100,
    )


def _refused() -> list[str]:
    engine = _engine()
    engine.truncate(mask_dropping(engine.groups, 0, 3))
    for _ in range(5):
        engine.optimizer.zero_grad()
        engine.model(random_images(4, seed=dist.get_rank())).square().mean().backward()
        engine.optimizer.step()
    state, said = through_a_file(engine.state_dict()), []
    assert "conv1.weight" in _errors(state["rank"]["training"]["reducer"]["averager"])
    for change in CHANGES.values():
        mine = copy.deepcopy(state)
        if dist.get_rank() == 1:
            change(mine["rank"]["training"]["reducer"]["averager"])
        try:
            _engine().load_state_dict(mine)
        except worm_dist.WormError as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("accepted")
    _engine().load_state_dict(state)
    return said


@pytest.mark.fault(46, "PowerSGD's memory on one rank alone")
def test_what_does_not_fit_on_one_rank_is_refused_on_all(ranks: Ranks) -> None:
    """It ended in KeyError or a shape that torch's hook could not add, on that rank alone; the
    others waited for it."""
    zero, one = ranks(2, _refused)
    for expected, here, there in zip(CHANGES, zero, one, strict=True):
        assert here == there
        assert here.startswith("CheckpointError: rank 1: ") and expected in here
