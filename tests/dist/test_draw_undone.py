"""A draw that fails on the way, on one rank: on all of them everything is as it was, to the bit.

It once left a network of mixed widths on that rank, and the others waiting for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

import worm_dist
from tests.failing import BROKEN, PLACES, broken, everything
from tests.nets import Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from tests.resuming import differences, transformer
from worm_dist import DrawError, WormConfig

pytestmark = pytest.mark.slow("draws that fail in every step, ten seconds")

_DROPPED = (0, 2, 3, 9)
_HOLD: Mapping[str, Any] = {"frozen_weights": "hold"}
_STAGES: Mapping[str, Any] = {"removal": {"duration": "12ba", "fade_steps": 1, "stage": 0.5}}


class _Training:
    """Channels are truncated from the fourth step on.

    Args:
        truncation: settings.
        is_gated: whether gates have to be folded.
    """

    def __init__(self, truncation: Mapping[str, Any], is_gated: bool) -> None:
        torch.manual_seed(0)
        self.network: nn.Module = transformer() if is_gated else Residual()
        randomise(self.network, seed=3)
        model: nn.Module = self.network
        if dist.is_initialized():
            model = DistributedDataParallel(self.network)
        self.average = AveragedModel(self.network)
        self.optimizer = AdamW(self.network.parameters(), lr=0.01)
        self.engine = worm_dist.attach(
            model,
            self.optimizer,
            WormConfig(truncation=truncation, search={"settled": 1.0}),
            example_inputs=random_images(1),
            steps_per_epoch=4,
        )
        self.mask = mask_dropping(self.engine.groups, *_DROPPED)
        self._number = 0

    def train(self, num_steps: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        for _ in range(num_steps):
            self.optimizer.zero_grad()
            images = random_images(8, seed=2 * self._number + rank)
            (self.engine.model(images).square().mean() + self.engine.penalty()).backward()
            self.optimizer.step()
            self._number += 1

    def train_until_it_may_draw(self) -> None:
        self.train(3)
        self.engine.truncate(self.mask)
        if not self.engine.config.truncation.removes:
            return self.train(3)
        for _ in range(30):
            self.train(1)
            if self.engine.check().stage:
                return
        raise AssertionError("no channel has left")

    def draw(self) -> None:
        mask = None if self.engine.config.truncation.removes else self.mask
        self.engine.draw(mask, copies=[self.average.module])

    @property
    def everything(self) -> dict[str, Any]:
        averages = {name: value.clone() for name, value in self.average.state_dict().items()}
        return everything(self.engine, self.network, self.optimizer) | {"averages": averages}

    @property
    def outcome(self) -> dict[str, Any]:
        state = self.network.state_dict() | {"average": self.average.module.state_dict()}
        traffic = self.engine.traffic
        return {"state": state, "sent": traffic.total_sent_bytes, "bytes": traffic.sent_bytes}


def _undone(truncation: Mapping[str, Any], is_gated: bool, rank: int) -> list[str]:
    """What is wrong after a draw has failed at each place in turn, and then succeeds."""
    alone, failing = _Training(truncation, is_gated), _Training(truncation, is_gated)
    wrong: list[str] = []
    for training in (alone, failing):
        training.train_until_it_may_draw()
    for place in PLACES:
        if "gates" in place and failing.engine.config.truncation.removes:
            continue  # they are folded by the last draw only
        before = failing.everything
        try:
            with broken(place, rank):
                failing.draw()
        except DrawError as error:
            if BROKEN not in str(error) or (f"rank {rank}" not in str(error) and rank):
                wrong.append(f"{place}: {error}")
        else:
            wrong.append(f"{place}: drawn")
        wrong += list(differences(before, failing.everything, place))
        for training in (alone, failing):
            training.train(1)
        wrong += list(differences(alone.outcome, failing.outcome, f"{place}, a step later"))
    for training in (alone, failing):
        training.draw()
        training.train(3)
    wrong += list(differences(alone.outcome, failing.outcome, "in the end"))
    return wrong


_RUNS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "truncated": (_HOLD, False),
    "gates": (_HOLD, True),
    "a stage": (_STAGES, False),
}


@pytest.mark.parametrize("world", [NO_GROUP, 2])
@pytest.mark.parametrize("name", _RUNS)
def test_everything_is_as_it_was(ranks: Ranks, name: str, world: int) -> None:
    for wrong in ranks(world, _undone, *_RUNS[name], 1 if world == 2 else 0):
        assert wrong == []
