"""Rank state: what differs from rank to rank comes to rank zero without filling its device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.faults.trainers import small_trainer
from tests.ranks import Ranks
from tests.resuming import differences
from worm_dist.checkpoint.rng_state import random_state
from worm_dist.training.rank_state import gathered_on_rank_zero

MOST_BYTES = 6000


def _state(rank: int) -> dict[str, Any]:
    return {
        "random": random_state(),
        "losses": [0.1, float(rank)],
        "errors": {"a": torch.full((rank * 1000 + 1,), rank), "b": torch.ones(3, 2).bfloat16().t()},
        "none": None,
    }


def _gathered() -> tuple[Any, list[int], list[str]]:
    rank, largest = dist.get_rank(), []
    torch.manual_seed(rank)
    real = dist.gather

    def seen(tensor: torch.Tensor, parts: Any, **keywords: Any) -> Any:
        largest.append(tensor.nbytes)
        return real(tensor, parts, **keywords)

    vars(dist)["gather"] = seen
    states = gathered_on_rank_zero(_state(rank), torch.device("cpu"), MOST_BYTES)
    wrong = []
    for other, state in enumerate(states):
        torch.manual_seed(other)
        wrong += list(differences(_state(other)["errors"], state["errors"], f"rank {other}"))
        wrong += list(differences(torch.get_rng_state(), state["random"]["torch"], str(other)))
        wrong += [] if state["losses"] == [0.1, float(other)] else [str(state["losses"])]
    return len(states), largest, wrong


def test_states_come_in_pieces(ranks: Ranks) -> None:
    """Under PowerSGD on 64 ranks 6.6 GB of error feedback went through rank zero's GPU at once."""
    (count, largest, wrong), *others = ranks(3, _gathered)
    assert count == 3 and not wrong
    assert max(largest) == MOST_BYTES // 3 and len(largest) > 5
    assert all(other == (0, largest, []) for other in others)


def _precisions() -> list[torch.dtype]:
    trainer = small_trainer(precision="bf16")
    seen: list[torch.dtype] = []
    trainer._parts.network.get_submodule("features.0").register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    trainer._parts.network.train()
    trainer._train_step(*next(iter(trainer._parts.train_loader)))
    trainer._position.batch = 1
    trainer._state.one_pass().backward()
    return seen


def test_the_pass_after_a_resume_is_in_the_precision_of_the_run(ranks: Ranks) -> None:
    """It ran in float32, and took more memory than any step of a run in bf16."""
    ((step, resumed),) = ranks(1, _precisions)
    assert step == resumed == torch.bfloat16
