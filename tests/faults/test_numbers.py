"""A number that is none: all ranks stop at the same step, before it reaches a weight."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.faults.driver import Act, Driver, Fault, Run
from tests.faults.trainers import small_trainer
from tests.ranks import Ranks
from worm_dist import NonFiniteError
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.training.nonfinite import FiniteCheck
from worm_dist.training.trainer import Trainer

STEP = 3
TOLD = (
    f"step {STEP}: the gradients are not finite; the loss is {{}}; lower optimizer.lr, train in "
    "fp32, or look at the data of a rank whose loss is not finite"
)


def _poison(real: Act, trainer: Any, inputs: Tensor, targets: Tensor) -> Any:
    """Not by way of the data, which are looked at."""
    return real(trainer, torch.full_like(inputs, torch.nan), targets)


def _weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.engine.model.parameters()]


def _stopped(spoil: Callable[[Trainer, int], None], **settings: Any) -> tuple[str, int, bool, bool]:
    """Train; spoil something before every step.

    Returns:
        The error, the optimizer's steps, and whether the weights are what they were before the step
        that it happened in, and were not what they were before that.
    """
    trainer = small_trainer(**settings)
    real, seen = trainer._train_step, [_weights(trainer)]

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(_weights(trainer))
        spoil(trainer, trainer.engine.step + 1)
        return real(inputs, targets)

    trainer._train_step = step  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    same, moved = (
        all(map(torch.equal, before, _weights(trainer))) for before in (seen[-1], seen[-2])
    )
    return str(caught.value), trainer.engine.step, same, not moved


def _nan_inputs(trainer: Trainer, step: int) -> None:
    if step == STEP and dist.get_rank() == 1:

        def spoil(model: nn.Module, inputs: Any) -> Any:
            handle.remove()
            return (torch.full_like(inputs[0], torch.nan),)

        handle = trainer.engine.model.register_forward_pre_hook(spoil)


def _infinite_gradient(trainer: Trainer, step: int) -> None:
    """In one element, on rank zero; the losses are as ever."""
    if step == STEP and dist.get_rank() == 0:
        bias = list(trainer.engine.model.parameters())[-1]

        def spoil(gradient: Tensor) -> Tensor:
            handle.remove()
            return gradient.index_fill(0, torch.tensor(3), torch.inf)

        handle = bias.register_hook(spoil)


@pytest.mark.fault(14, "NaN in the inputs of rank one")
def test_a_nan_on_one_rank_stops_all_before_the_step(ranks: Ranks) -> None:
    """The run went on to the end of the epoch, and the weights were NaN by then."""
    first, second = ranks(2, _stopped, _nan_inputs)
    assert first == second
    told, *seen = first
    assert seen == [STEP - 1, True, True]
    start, _, end = TOLD.partition("{}")
    assert told.startswith(start) and told.endswith(end)
    assert " on rank 0, nan on rank 1; " in told


@pytest.mark.fault(14, "an infinity in one gradient of rank zero")
def test_an_infinite_gradient_stops_all_before_the_step(ranks: Ranks) -> None:
    first, second = ranks(2, _stopped, _infinite_gradient)
    assert first[1:] == second[1:] == (STEP - 1, True, True)
    assert "step 3: the gradients are not finite" in first[0]


def _under_deepspeed() -> tuple[str, int, bool, bool]:
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")
    return _stopped(_nan_inputs, distributed={"backend": "deepspeed"})


@pytest.mark.slow("imports DeepSpeed on every rank")
@pytest.mark.fault(14, "the same under DeepSpeed")
def test_a_nan_under_deepspeed_stops_all_at_the_same_step(ranks: Ranks) -> None:
    pytest.importorskip("deepspeed")
    outcomes = ranks.outcomes(2, _under_deepspeed, group_timeout=100)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    first, second = (outcome.value for outcome in outcomes)
    assert first == second and first[1:] == (STEP - 1, True, True)


@pytest.mark.fault(14, "one line and one exit code of the command line")
def test_it_is_told_once(driver: Driver) -> None:
    poisoned = Fault.do(_poison, rank=1, step=STEP)
    ends = driver(2, Run((poisoned,), {"checkpoint.every": "1ba"}))
    assert [(end.exitcode, len(end.errors)) for end in ends] == [(5, 1), (5, 0)]
    assert "step 3: the gradients are not finite" in ends[0].said
    assert not (driver.out / "result.json").exists()
    newest = CheckpointManager(driver.out / "checkpoints").newest()
    assert newest is not None and newest.step == STEP - 1, "what is not finite is not saved"


def _num_collectives_of_steps() -> tuple[int, int]:
    """Of five steps with and without a look."""

    def of_five_steps(trainer: Trainer) -> int:
        batches = [batch for _, batch in zip(range(6), trainer._parts.train_loader)]
        trainer._train_step(*batches[0])  # DDP arranges its buckets in the first one
        assert dist.group.WORLD is not None
        before: int = dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[attr-defined]
        for batch in batches[1:]:
            trainer._train_step(*batch)
        after: int = dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[attr-defined]
        return after - before

    looked = of_five_steps(small_trainer())
    FiniteCheck.check = lambda *_: None  # type: ignore[method-assign]
    return looked, of_five_steps(small_trainer())


def test_a_look_costs_no_collective(ranks: Ranks) -> None:
    for looked, not_looked in ranks(2, _num_collectives_of_steps):
        assert looked == not_looked > 0
