"""The generators of Python, numpy and torch go on where they stood."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.states import difference, info
from worm_dist import CheckpointError
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.rng_state import random_state, restore_random_state


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    state = random_state()
    yield
    restore_random_state(state)


def _numbers() -> list[Any]:
    # Normal numbers come in pairs, of which the second is kept.
    return [
        *(random.random(), random.gauss(0, 1), random.getrandbits(70)),
        *(np.random.rand(), np.random.randn(), np.random.randint(1000)),
        *(torch.rand(3).tolist(), torch.randn(3).tolist(), torch.randperm(5).tolist()),
    ]


@pytest.mark.parametrize("odd", [False, True])
def test_through_a_checkpoint(tmp_path: Path, odd: bool) -> None:
    if odd:
        _numbers()
    path = CheckpointManager(tmp_path).save(info(1), {"run": random_state()})
    wanted = [_numbers() for _ in range(3)]
    state = Checkpoint(path).read("run")
    restore_random_state(state)
    assert not difference(random_state(), state)
    assert [_numbers() for _ in range(3)] == wanted


@pytest.mark.parametrize("key", ["python", "numpy", "torch"])
@pytest.mark.parametrize("value", [None, 3, (1, 2), {}, {"state": {}}, torch.zeros(3)])
def test_something_else_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match="not the state of random generators"):
        restore_random_state({**random_state(), key: value})


def test_a_key_that_is_missing_is_refused() -> None:
    with pytest.raises(CheckpointError, match="numpy"):
        restore_random_state({"python": random.getstate()})
