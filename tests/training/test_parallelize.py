"""The wrapper of the main job: less work than by torch's defaults, and the same run to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from tests.faults.courses import ALL_PHASES, differences_of_runs
from tests.faults.trainers import small_trainer
from tests.faults.training import train
from tests.operations import num_operations
from tests.ranks import Ranks
from worm_dist.training import parallelize


def _as_torch_does() -> None:
    vars(parallelize)["_fewer_copies"] = dict


def _both_ways(folder: Path, settings: dict[str, Any]) -> None:
    train(folder / "ours", **settings)
    _as_torch_does()
    train(folder / "plain", **settings)


@pytest.mark.slow("trains four runs")
@pytest.mark.parametrize(
    "settings",
    [{}, {"truncation.frozen_weights": "hold", "ticket.recalibrate_batches": 0}],
    ids=["removed", "held"],
)
def test_views_and_statistics_of_its_own_change_nothing(
    ranks: Ranks, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Weights, moments, masks, bytes and figures; rank zero's statistics, which are saved; and the
    accuracies, to which every rank contributes."""
    call = (_both_ways, tmp_path, {**ALL_PHASES, "checkpoint.keep_last": 100, **settings})
    for outcome in ranks.outcomes(2, *call):
        assert outcome.exitcode == 0, str(outcome)
    found = list(differences_of_runs(tmp_path / "plain", tmp_path / "ours"))
    assert not found, "\n".join(found[:20])


def _one_epoch() -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Running means of this rank before and after the test, and the number of broadcasts in a
    step."""
    trainer = small_trainer(epochs=1)
    network = trainer.engine.model.get_submodule("module")
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]

    def means() -> list[torch.Tensor]:
        return [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]

    trainer._train_epoch()
    before = means()
    trainer._end_epoch()
    trainer.require_consistent()
    return before, means(), len(norms)


def test_statistics_are_of_each_rank_until_the_test_uses_rank_zeros(ranks: Ranks) -> None:
    """They differ, which the comparison of the ranks does not mistake for a divergence."""
    (zero, zero_after, num_norms), (one, one_after, _) = ranks(2, _one_epoch)
    assert len(zero) == num_norms > 0
    for mine, other in zip(zero, one, strict=True):
        assert not torch.equal(mine, other)
    for mine, after, other_after in zip(zero, zero_after, one_after, strict=True):
        assert torch.equal(mine, after) and torch.equal(mine, other_after)


def _operations_of_a_step() -> tuple[int, int, int, int]:
    """With ours, by torch's defaults; the number of parameters, and of buffers."""
    found = []
    for is_plain in (False, True):
        if is_plain:
            _as_torch_does()
        trainer = small_trainer()
        step = partial(trainer._train_step, *next(iter(trainer._parts.train_loader)))
        for _ in range(3):  # buckets are rebuilt after the first
            step()
        found.append(num_operations(step))
    model = trainer.engine.model
    return found[0], found[1], len(list(model.parameters())), len(list(model.buffers()))


def test_a_gradient_is_copied_once_less_and_nothing_is_broadcast(ranks: Ranks) -> None:
    ((ours, plain, num_parameters, num_buffers),) = ranks(1, _operations_of_a_step)
    # To broadcast, buffers are put together and copied back, one by one.
    assert plain - ours >= num_parameters + num_buffers, (plain, ours)
