"""Weights that drift apart are found, and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.faults.driver import Act, Driver, Fault, Run
from tests.faults.trainers import small_trainer
from tests.ranks import Ranks
from worm_dist import DivergenceError, Mask
from worm_dist.training.trainer import Trainer


def _network(trainer: Trainer) -> nn.Module:
    assert isinstance(trainer.engine.model, DistributedDataParallel)
    network = trainer.engine.model.module
    assert isinstance(network, nn.Module)
    return network


def _push(trainer: Trainer) -> None:
    with torch.no_grad():
        next(_network(trainer).parameters()).view(-1)[0] += 1e-3


def _push_all(trainer: Trainer) -> None:
    with torch.no_grad():
        for parameter in _network(trainer).parameters():
            parameter.add_(1e-3)


def _push_by_one_bit(trainer: Trainer) -> None:
    bias = list(_network(trainer).parameters())[-1].detach()
    bias[:1].view(torch.int32).bitwise_xor_(1)


def _count_one_more(trainer: Trainer) -> None:
    norm = next(m for m in _network(trainer).modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1


def _train(spoil: Callable[[Trainer], None], rank: int, check_every: str) -> str:
    trainer = small_trainer(divergence={"check_every": check_every})
    real = trainer._train_step

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = real(inputs, targets)
        if trainer.engine.step == 2 and dist.get_rank() == rank:
            spoil(trainer)
        return loss

    trainer._train_step = step  # type: ignore[method-assign]
    with pytest.raises(DivergenceError) as caught:
        trainer.run()
    return str(caught.value)


@pytest.mark.fault(17, "one weight, one bit, one counter of one rank, compared every step")
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_push, "parameter features.0.weight is "),
        (_push_by_one_bit, "parameter"),
        (_count_one_more, "buffer"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_it_is_found_at_the_very_step(
    ranks: Ranks, spoil: Callable[[Trainer], None], name: str, rank: int
) -> None:
    first, second = ranks(2, _train, spoil, rank, "1ba")
    assert first == second
    assert first.startswith(f"step 2: the ranks no longer hold the same network: {name}")
    assert " on rank 0, " in first and " on rank 1. " in first


@pytest.mark.fault(17, "found at the end of the epoch, unless something else is asked for")
def test_it_is_found_within_the_interval(ranks: Ranks) -> None:
    first, second = ranks(2, _train, _push_all, 1, "1ep")
    assert first == second and first.startswith("step 8: ")
    assert first.count(" on rank 1") == 3 and " (and 5 more). Resume from" in first


def _step_and_push(real: Act, trainer: Trainer, *batch: Tensor) -> Tensor:
    loss: Tensor = real(trainer, *batch)
    _push(trainer)
    return loss


@pytest.mark.fault(17, "before a checkpoint is made of it")
def test_it_is_not_saved(driver: Driver) -> None:
    """Rank zero's weights alone would have been whole, and wrong."""
    settings = {"divergence.check_every": "9ep", "checkpoint.every": "2ba"}
    ends = driver(2, Run((Fault.do(_step_and_push, rank=1, step=3),), settings))
    assert [(end.exitcode, len(end.errors)) for end in ends] == [(4, 1), (4, 0)]
    assert "step 4: the ranks no longer hold the same network: parameter" in ends[0].said
    assert [path.name for path in (driver.out / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.fault(17, "of three ranks the odd one is named")
def test_equal_ranks_stand_together(ranks: Ranks) -> None:
    first, *others = ranks(3, _train_with_batches_for_three)
    assert others == [first] * 2
    assert " on ranks 0, 2, " in first and " on rank 1. " in first


def _train_with_batches_for_three() -> str:
    trainer = small_trainer(data={"batch_size": 18}, divergence={"check_every": "1ba"})
    if dist.get_rank() == 1:
        _push_by_one_bit(trainer)
    with pytest.raises(DivergenceError) as caught:
        trainer.require_consistent()
    return str(caught.value)


def _train_well() -> tuple[int, list[Tensor]]:
    """Steps, and the running means right after one."""
    trainer = small_trainer(divergence={"check_every": "1ba"})
    real = trainer.require_consistent
    means: list[Tensor] = []

    def require_consistent() -> None:
        real()
        norms = [m for m in _network(trainer).modules() if isinstance(m, nn.BatchNorm2d)]
        means[:] = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]

    trainer.require_consistent = require_consistent  # type: ignore[method-assign]
    trainer.run()
    return trainer.engine.step, means


def test_running_statistics_may_differ_between_two_steps(ranks: Ranks) -> None:
    """Each rank's own batch has moved them; the next step begins with rank zero's."""
    (steps, first), (_, second) = ranks(2, _train_well)
    assert steps == 16
    assert first and not any(map(torch.equal, first, second))


def _with_a_removed_channel_written_to() -> tuple[str, int]:
    trainer = small_trainer(
        preset="worm",
        truncation={"removal": {"duration": "2ba", "fade_steps": 1}},
        divergence={"check_every": "1ba"},
    )
    engine = trainer.engine
    group = engine.groups[0]
    dropped = {g.name: torch.arange(g.num_channels) != 1 for g in engine.groups}
    real = trainer._train_step

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = real(inputs, targets)
        if engine.step == 1:
            engine.truncate(Mask(dropped))
        if engine.step == 8:
            assert engine.num_nonzero_removed == 0
            with torch.no_grad():
                _network(trainer).get_parameter(group.norms[0].parameters[0][0])[1] = 1e-6
        return loss

    trainer._train_step = step  # type: ignore[method-assign]
    trainer._check = lambda: None  # type: ignore[method-assign]
    with pytest.raises(DivergenceError) as caught:
        trainer.run()
    return str(caught.value), engine.step


@pytest.mark.fault(17, "a removed channel is no longer zero, on all ranks")
def test_a_removed_channel_that_comes_back_is_found(ranks: Ranks) -> None:
    """Equal on all ranks, so that no comparison of them finds it; its columns are not averaged any
    more, and would drift apart."""
    for message, step in ranks(2, _with_a_removed_channel_written_to):
        assert step == 8 and message.startswith("step 8: 1 scales and shifts of removed channels")
