"""A budget in a whole run on two ranks: all masks are the same, and the ticket meets it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, Residual, random_images, randomise
from tests.ranks import Ranks
from worm_dist import WormConfig
from worm_dist.groups.flops import count_flops

_IMAGE = random_images(1, side=4)


class Run(NamedTuple):
    """Attributes:
    digests: of the mask after each check.
    reached: the share that the engine says, after each check.
    dense: FLOPs before.
    ticket: FLOPs of the drawn network.
    more: FLOPs with the strongest dropped channel put back, as the cost model has it.
    """

    digests: list[str]
    reached: list[float]
    dense: int
    ticket: int
    more: int


def _run(search: dict[str, Any], truncation: dict[str, Any]) -> Run:
    torch.manual_seed(0)
    network = Residual(width=24, inner=16)
    randomise(network, seed=4)
    dense = count_flops(network, _IMAGE)
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    config = WormConfig(
        search={"window": 3, "settled": 0.3, "l1": 0.01, "every": "2ba", **search},
        truncation=truncation,
        ticket={"round_to": 1},
    )
    engine = worm_dist.attach(
        DistributedDataParallel(network),
        optimizer,
        config,
        example_inputs=_IMAGE,
        steps_per_epoch=2,
    )
    digests, reached = [], []
    for number in range(30):
        images = random_images(10, side=4, seed=10 * number + dist.get_rank())
        loss = nn.functional.cross_entropy(engine.model(images), torch.arange(10))
        optimizer.zero_grad()
        (loss + engine.penalty()).backward()
        optimizer.step()
        if engine.phase != "ticket" and number % 2:
            verdict = engine.check()
            assert engine.mask is not None and engine.budget is not None
            digests.append(engine.mask.digest)
            reached.append(engine.budget.share_of(engine.mask))
            if verdict.stage or verdict.ticket:
                engine.draw()
    assert engine.phase == "ticket" and engine.mask is not None and engine.budget is not None
    # Of the groups' channels all cost the same, so the least that one more can add is known.
    kept = engine.mask.num_kept_by_group
    costs = [engine.budget.cost.of(kept + one) for one in torch.eye(len(kept)).long()]
    return Run(digests, reached, dense, count_flops(network, _IMAGE), max(costs))


@pytest.mark.parametrize(
    ("search", "truncation"),
    [
        ({"budget": {"flops": 0.25}}, {"removal": {"duration": "6ba", "fade_steps": 1}}),
        ({"budget": {"flops": 0.5}, "threshold": "layer"}, {"frozen_weights": "hold"}),
    ],
    ids=["removed", "held, layer by layer"],
)
def test_all_masks_are_the_same_and_the_ticket_meets_it(
    ranks: Ranks, search: dict[str, Any], truncation: dict[str, Any]
) -> None:
    outcomes = ranks.outcomes(2, _run, search, truncation)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    first, second = (outcome.value for outcome in outcomes)
    assert first == second
    limit = search["budget"]["flops"] * first.dense
    assert first.ticket <= limit < first.more
    assert first.reached[-1] == first.ticket / first.dense
    assert all(share * first.dense <= limit for share in first.reached)


class _Orthogonal(nn.Conv2d):
    """Has operations that are not in proportion to its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        filters = self.weight.detach().flatten(1)
        self.overlap = (filters @ filters.T).norm()
        return super().forward(input)


def _attach(kind: str) -> None:
    torch.manual_seed(0)
    network = Plain()
    if kind == "unpredictable":
        network.conv2 = _Orthogonal(6, 8, 3, padding=1)
    share = 0.001 if kind == "too small" else 0.5
    side = 4 + dist.get_rank() if kind == "other sizes" else 4
    worm_dist.attach(
        DistributedDataParallel(network),
        SGD(network.parameters(), lr=0.1),
        WormConfig(search={"budget": {"flops": share}}),
        example_inputs=random_images(1, side=side),
        steps_per_epoch=2,
    )


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("unpredictable", "ConfigError", "search.budget.flops: cannot be predicted exactly"),
        ("too small", "ConfigError", "search.budget.flops: 0.001 cannot be met"),
        ("other sizes", "DivergenceError", "state of group search.budget: rank 1 differs"),
    ],
)
def test_what_cannot_be_met_is_refused_on_every_rank(
    ranks: Ranks, kind: str, error: str, text: str
) -> None:
    outcomes = ranks.outcomes(2, _attach, kind, group_timeout=30)
    for outcome in outcomes:
        assert outcome.error == error and text in outcome.text, str(outcome)
