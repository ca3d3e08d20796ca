"""Under DeepSpeed too a run that is broken off and resumed ends the same, to the bit.

The optimizer's state goes through rank zero, whole: it can be gone on from in another stage.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.nets import Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.resuming import Course, differences, through_a_file, transformer
from tests.settings import at_once
from tests.zero.building import engine_around, settings_of, whole
from worm_dist import WormConfig

pytestmark = pytest.mark.slow("imports DeepSpeed on every rank, many times")

FADE_STEPS = 3


def _optimizer(name: str, network: nn.Module) -> Optimizer:
    if name == "sgd":
        return SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    parameters = list(network.parameters())
    return AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() <= 1], "lr": 0.02},
        ],
        lr=0.01,
    )


class Sharded:
    """In DeepSpeed's engine; in stage None under DistributedDataParallel."""

    def __init__(
        self,
        stage: int | None,
        precision: str,
        optimizer: str,
        config: WormConfig,
        net: Callable[[], nn.Module] = Residual,
    ) -> None:
        torch.manual_seed(0)
        self.network = net()
        randomise(self.network, seed=3)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.optimizer = _optimizer(optimizer, self.network)
        settings: dict[str, Any] = {"zero_optimization": {"round_robin_gradients": False}}
        if precision == "bf16":
            settings |= {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
        self.engine = worm_dist.attach(
            DistributedDataParallel(self.network)
            if stage is None
            else engine_around(self.network, self.optimizer, settings_of(stage, **settings)),
            self.optimizer,
            config,
            example_inputs=random_images(1).to(self._dtype),
        )

    def step(self, number: int) -> None:
        model: Any = self.engine.model
        images = random_images(4, seed=10 * number + dist.get_rank()).to(self._dtype)
        loss = nn.functional.cross_entropy(model(images).float(), torch.arange(4))
        loss = loss + self.engine.penalty().float()
        if isinstance(model, DistributedDataParallel):
            self.engine.optimizer.zero_grad()
            loss.backward()
            self.engine.optimizer.step()
        else:
            model.backward(loss)
            model.step()

    def save(self) -> Any:
        return {
            "engine": self.engine.state_dict(),
            "network": self._whole_state(),
            "optimizer": _from_rank_zero(self.engine.optimizer_state()),
        }

    def load(self, state: Any) -> None:
        self.engine.load_state_dict(state["engine"])
        with whole(self.engine.model, self.network, written_by=0):
            self.network.load_state_dict(state["network"])
        self.engine.load_optimizer_state(state["optimizer"])

    def _whole_state(self) -> Any:
        with whole(self.engine.model, self.network):
            return copy.deepcopy(self.network.state_dict())


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


def _slower(trainee: Sharded) -> None:
    for group in trainee.optimizer.param_groups:
        group["lr"] /= 2


def _config(rule: str) -> WormConfig:
    return WormConfig(
        search={"every": "2ba", "l1": 0.01},
        truncation={**at_once(FADE_STEPS), "frozen_weights": rule},
        ticket={"recalibrate_batches": 3},
    )


# Two partitions of the network meet within channel 13.
EVENTS = {
    1: _slower,
    2: _truncate(0, 3, 9, 13),
    4: _truncate(0, 3, 9, 12, 13),
    11: _draw(0, 3, 9, 12, 13),
}


def _broken_off(
    stage: int, precision: str, optimizer: str, rule: str, net: Callable[[], nn.Module]
) -> list[str]:
    # In a fade, while silent columns are listened to, once they have left, after the draw.
    course = Course(num_steps=14, events=EVENTS, saved_at=[3, 7, 8, 12])
    found = course.resumed(lambda: Sharded(stage, precision, optimizer, _config(rule), net))
    if stage < 3:
        return found
    # To save whole weights releases small ones that would have stayed gathered for the next pass.
    return [line for line in found if "sent_bytes" not in line and "dense_bytes" not in line]


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer", "rule", "net"),
    [
        (0, "fp32", "sgd", "remove", Residual),
        (0, "bf16", "adamw", "hold", Residual),
        (1, "fp32", "adamw", "remove", Residual),
        (1, "bf16", "adamw", "remove", Residual),
        (2, "fp32", "sgd", "hold", Residual),
        (2, "bf16", "sgd", "remove", transformer),
        (3, "fp32", "sgd", "remove", Residual),
        (3, "bf16", "adamw", "remove", transformer),
    ],
)
def test_broken_off_anywhere_it_ends_the_same(
    ranks: Ranks, stage: int, precision: str, optimizer: str, rule: str, net: Any
) -> None:
    for found in ranks(2, _broken_off, stage, precision, optimizer, rule, net):
        assert not found, "\n".join(found[:20])


def _elsewhere() -> list[str]:
    """What differs at the end if another stage goes on; None is DistributedDataParallel."""
    pairs = ((2, None), (None, 1), (1, 2), (2, 3), (3, 1))
    return [line for stages in pairs for line in _from_to(*stages)]


def _from_to(stage: int | None, other: int | None) -> list[str]:
    found: list[str] = []
    whole = Sharded(stage, "fp32", "adamw", _config("remove"))
    states, end = {}, 14
    for number in range(end):
        if number in (3, 12):
            states[number] = through_a_file(whole.save())
        EVENTS.get(number, id)(whole)
        whole.step(number)
    for first, state in states.items():
        again = Sharded(other, "fp32", "adamw", _config("remove"))
        again.load(state)
        for number in range(first, end):
            EVENTS.get(number, id)(again)
            again.step(number)
        # Statistics are each rank's own under DeepSpeed.
        for key, of in {"weights": _weights, "moments": _moments}.items():
            found += differences(of(whole), of(again), f"{stage} to {other}, step {first}: {key}")
    return found


def _weights(trainee: Sharded) -> dict[str, Any]:
    with whole(trainee.engine.model, trainee.network):
        return {name: p.detach().clone() for name, p in trainee.network.named_parameters()}


def _moments(trainee: Sharded) -> Any:
    state = _from_rank_zero(trainee.engine.optimizer_state())
    return state["parameters"]


def test_another_stage_goes_on_with_the_same_bits(ranks: Ranks) -> None:
    for found in ranks(2, _elsewhere):
        assert not found, "\n".join(found[:20])


def _with_bytes_of_a_skipped_step() -> list[str]:
    config = _config("hold")

    def overflow(trainee: Any) -> None:
        """A step on infinite gradients, which DeepSpeed skips; its bytes are those of the next."""
        model = trainee.engine.model
        images = random_images(4, seed=dist.get_rank()).to(torch.bfloat16)
        model.backward(model(images).float().square().mean() * torch.inf)
        model.step()

    course = Course(num_steps=6, events={2: _truncate(0, 3, 9), 4: overflow}, saved_at=[3, 5])
    found = course.resumed(lambda: Sharded(1, "bf16", "sgd", config))
    before = Sharded(1, "bf16", "sgd", config)
    for number in range(2):
        before.step(number)
    overflow(before)
    state = before.save()
    again = Sharded(1, "bf16", "sgd", config)
    again.load(through_a_file(state))
    for trainee in (before, again):
        trainee.step(2)
    found += differences(before.save(), again.save(), "after a skipped step")
    assert before.engine.model.skipped_steps == again.engine.model.skipped_steps == 1
    return found


def test_what_a_skipped_step_sent_is_said_of_the_next_one(ranks: Ranks) -> None:
    for found in ranks(2, _with_bytes_of_a_skipped_step):
        assert not found, "\n".join(found[:20])


def _refused() -> dict[str, str]:
    """What is said of states that do not fit; and nothing has been changed by then."""
    trainee = Sharded(1, "fp32", "adamw", _config("hold"))
    trainee.step(0)
    state = trainee.save()["optimizer"]
    without = copy.deepcopy(state)
    del without["parameters"]["bn1.bias"]
    smaller = copy.deepcopy(state)
    moments = smaller["parameters"]["conv1.weight"]["moments"]
    moments["exp_avg"] = moments["exp_avg"][1:]
    regrouped = copy.deepcopy(state)
    regrouped["groups"].reverse()
    faster = copy.deepcopy(state)
    faster["groups"][0]["options"]["lr"] = 0.5
    lower = {"none": None, "without": without, "smaller": smaller, "regrouped": regrouped}
    said = {}
    for name, wrong in {**lower, "faster": faster}.items():
        mine = dist.get_rank() == 1
        try:
            trainee.engine.load_optimizer_state(wrong if mine else state)
        except worm_dist.WormError as error:
            said[name] = f"{type(error).__name__}: {error}"
    assert not list(differences(trainee.save()["optimizer"], state, "changed"))
    return said


def test_a_state_that_does_not_fit_is_refused_on_all_ranks(ranks: Ranks) -> None:
    other, mine = ranks(2, _refused)
    assert other == mine
    faster = mine.pop("faster")
    assert faster.startswith("DivergenceError: ") and "load_optimizer_state" in faster
    for said in mine.values():
        assert said.startswith("CheckpointError: rank 1: load_optimizer_state: "), said
    assert "parameters: bn1.bias: the optimizer steps different ones" in mine["without"]
    assert "parameters.conv1.weight.exp_avg: wanted [6, 8, 3, 3], found [5, 8" in mine["smaller"]
    assert "groups: the optimizer's parameter groups differ" in mine["regrouped"]
