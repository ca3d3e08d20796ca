"""BatchNorm statistics are estimated once for a stage: by the check that offers the draw."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import Engine, WormConfig

_DROPPED = (0, 2, 3, 5, 9)
_BATCHES = 3


class _Run:
    """A run up to the check that offers the first stage.

    Attributes:
        passes: number of passes of the network itself, not of copies, since the last step.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = Residual()
        randomise(self.network, seed=1)
        self.passes = 0
        self.network.register_forward_pre_hook(self._count)
        model = DistributedDataParallel(self.network)
        self.optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        config = WormConfig(
            search={"every": "100ba", "l1": 0.0},
            truncation={"removal": {"duration": "14ba", "fade_steps": 2, "stage": 0.2}},
            ticket={"recalibrate_batches": _BATCHES},
        )
        self.engine: Engine = worm_dist.attach(
            model, self.optimizer, config, example_inputs=random_images(1)
        )

    def _count(self, network: nn.Module, args: Any) -> None:
        self.passes += network is self.network

    def forward(self) -> Tensor:
        images = random_images(6, seed=10 * self.engine.step + dist.get_rank())
        return nn.functional.cross_entropy(self.engine.model(images), torch.arange(6))

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.forward().backward()
        self.optimizer.step()
        self.passes = 0

    def to_the_first_stage(self) -> None:
        self.step()
        self.engine.truncate(mask_dropping(self.engine.groups, *_DROPPED))
        while not self.engine.check().stage:
            self.step()

    def passes_of_the_draw(self) -> int:
        self.passes = 0
        self.engine.draw()
        return self.passes


def _passes() -> dict[str, int]:
    found = {}
    run = _Run()
    run.to_the_first_stage()
    found["in the check"] = run.passes
    found["right after the check"] = run.passes_of_the_draw()

    run = _Run()
    run.to_the_first_stage()
    run.forward()
    found["after another pass"] = run.passes_of_the_draw()

    run = _Run()
    run.to_the_first_stage()
    if dist.get_rank() == 0:
        run.network(random_images(2))
    found["after a pass on one rank"] = run.passes_of_the_draw()

    run = _Run()
    run.to_the_first_stage()
    run.step()
    found["after another step"] = run.passes_of_the_draw()
    return found


def test_a_draw_right_after_its_check_does_not_run_the_network(ranks: Ranks) -> None:
    for found in ranks(2, _passes):
        assert found == {
            "in the check": _BATCHES,
            "right after the check": 0,
            "after another pass": _BATCHES,
            "after a pass on one rank": _BATCHES,
            "after another step": _BATCHES,
        }


def _resumed_between() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The networks of a run and of one that is resumed between the check and the draw."""
    run, resumed = _Run(), _Run()
    run.to_the_first_stage()
    state = run.engine.state_dict()
    weights = {name: value.clone() for name, value in run.network.state_dict().items()}
    optimizer = copy.deepcopy(run.optimizer.state_dict())
    run.engine.draw()
    resumed.engine.load_state_dict(state)
    resumed.network.load_state_dict(weights)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.engine.draw()
    return run.network.state_dict(), resumed.network.state_dict()


def test_a_run_resumed_between_check_and_draw_has_the_same_statistics(ranks: Ranks) -> None:
    """What the check had estimated is not known any more, and is estimated again: on the network
    before the draw too, as sums over fewer channels are rounded otherwise."""
    for went_on, resumed in ranks(2, _resumed_between):
        assert went_on.keys() == resumed.keys()
        assert all(torch.equal(went_on[name], resumed[name]) for name in went_on)
