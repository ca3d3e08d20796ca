"""A run that is broken off and resumed ends as if nothing had happened, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.nets import Flattening, Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.resuming import Course, transformer
from tests.settings import at_once
from worm_dist import WormConfig

pytestmark = pytest.mark.slow("trains many runs to their end, broken off and not")

FADE_STEPS = 3


NETS: dict[str, Any] = {
    "residual": Residual,
    "flattening": Flattening,
    "transformer": transformer,
}


def _optimizer(name: str, network: nn.Module) -> Optimizer:
    if name == "sgd":
        return SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    return AdamW(network.parameters(), lr=0.01, weight_decay=0.1)


class Parallel:
    """Under DistributedDataParallel, in a process group of its own."""

    def __init__(
        self, config: WormConfig, optimizer: str, net: str = "residual", **wrapper: Any
    ) -> None:
        torch.manual_seed(0)
        network = NETS[net]()
        randomise(network, seed=3)
        self.engine = worm_dist.attach(
            DistributedDataParallel(network, process_group=dist.new_group(), **wrapper),
            _optimizer(optimizer, network),
            config,
            example_inputs=random_images(1),
        )

    def step(self, number: int) -> None:
        torch.manual_seed(number)
        self.engine.optimizer.zero_grad()
        self._loss(number).backward()
        self.engine.optimizer.step()

    def _loss(self, number: int) -> Tensor:
        logits = self.engine.model(random_images(4, seed=10 * number + dist.get_rank()))
        loss = nn.functional.cross_entropy(logits, torch.arange(4))
        return loss + self.engine.penalty()

    def save(self) -> Any:
        engine = self.engine
        return {
            "engine": engine.state_dict(),
            "model": copy.deepcopy(engine.model.state_dict()),
            "optimizer": copy.deepcopy(engine.optimizer.state_dict()),
        }

    def load(self, state: Any) -> None:
        self.engine.load_state_dict(state["engine"])
        self.engine.model.load_state_dict(state["model"])
        self.engine.optimizer.load_state_dict(state["optimizer"])
        if dist.get_world_size() > 2:
            before = torch.get_rng_state()
            self.engine.restore_bucket_order(lambda: self._loss(0))
            assert torch.equal(torch.get_rng_state(), before)


def _truncate(*dropped: int) -> Any:
    return lambda t: t.engine.truncate(mask_dropping(t.engine.groups, *dropped))


def _draw(*dropped: int) -> Any:
    return lambda t: t.engine.draw(mask_dropping(t.engine.groups, *dropped))


def _decided(
    truncation: dict[str, Any], optimizer: str, net: str, wrapper: dict[str, Any]
) -> list[str]:
    """Masks from elsewhere: the second comes while what the first drops is fading."""
    config = WormConfig(
        search={"every": "2ba", "l1": 0.01},
        truncation={**at_once(FADE_STEPS), **truncation},
        ticket={"recalibrate_batches": 3},
    )
    course = Course(
        num_steps=17,
        events={2: _truncate(0, 3, 9), 4: _truncate(0, 3, 9, 12), 12: _draw(0, 3, 9, 12)},
        # Before and after fades begin and end, silent columns are listened to and leave, the draw.
        saved_at=[1, 3, 4, 5, 7, 8, 9, 12, 13, 15],
    )
    return course.resumed(lambda: Parallel(config, optimizer, net, **wrapper))


@pytest.mark.parametrize(
    ("truncation", "optimizer", "net", "wrapper"),
    [
        ({"frozen_weights": "remove"}, "sgd", "residual", {}),
        ({"frozen_weights": "remove"}, "adamw", "flattening", {"bucket_cap_mb": 0.001}),
        ({"frozen_weights": "hold", "scope": "coupled"}, "adamw", "residual", {}),
        ({"frozen_weights": "free"}, "sgd", "residual", {}),
        ({"mode": "soft"}, "adamw", "residual", {}),
        ({"frozen_weights": "remove"}, "sgd", "transformer", {}),
        ({"compression": "bf16"}, "sgd", "residual", {}),
        ({"compression": "powersgd"}, "adamw", "residual", {}),
        (
            {"compression": "powersgd", "compression_rank": 2},
            "sgd",
            "flattening",
            {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True},
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_broken_off_anywhere_it_ends_the_same(
    ranks: Ranks, truncation: dict[str, Any], optimizer: str, net: str, wrapper: dict[str, Any]
) -> None:
    for found in ranks(2, _decided, truncation, optimizer, net, wrapper):
        assert not found, "\n".join(found[:20])


@pytest.mark.parametrize(
    ("truncation", "net"),
    [({"frozen_weights": "remove"}, "residual"), ({"compression": "powersgd"}, "flattening")],
    ids=["fade", "powersgd"],
)
def test_after_a_rehearsal_more_than_two_ranks_add_in_the_same_order(
    ranks: Ranks, truncation: dict[str, Any], net: str
) -> None:
    """A ring adds a bucket's first third in another order than its second; and where a gradient
    lies in a bucket, DDP decides after the first pass."""
    for found in ranks(3, _decided, truncation, "sgd", net, {}):
        assert not found, "\n".join(found[:20])


def _searched(truncation: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Rank zero decides, from a history that has to be there; the phases that this goes through."""
    config = WormConfig(
        search={
            "every": "2ba",
            "window": 3,
            "settled": 0.3,
            "elbow": {"min_masks": 2, "margin": 0.3},
            "prune_ratio": 0.4,
            "l1": 0.05,
        },
        truncation={**at_once(FADE_STEPS), **truncation},
        ticket={"recalibrate_batches": 3},
    )
    phases: list[str] = []

    def check(trainee: Parallel) -> Any:
        verdict = trainee.engine.check()
        if verdict.stage or verdict.ticket:
            trainee.engine.draw()
        phases.append(trainee.engine.phase.value)
        return verdict

    course = Course(
        num_steps=18,
        events=dict.fromkeys(range(2, 18, 2), check),
        saved_at=[2, 3, 6, 7, 10, 12, 14, 15],
    )
    return course.resumed(lambda: Parallel(config, "sgd")), phases[:8]


@pytest.mark.parametrize(
    "truncation",
    [{}, {"mode": "soft"}, {"removal": {"duration": "6ba", "fade_steps": 2, "stage": 0.3}}],
)
def test_masks_verdicts_and_distances_are_the_same_too(
    ranks: Ranks, truncation: dict[str, Any]
) -> None:
    for found, phases in ranks(2, _searched, truncation):
        assert not found, "\n".join(found[:20])
        assert phases[0] == "search" and "truncate" in phases and phases[-1] == "ticket", phases
