"""Random state: where the generators of Python, numpy and torch stand."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError

__all__ = ["random_state", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """The state of this process's generators, that of the current CUDA device included.

    A checkpoint can hold it: numpy's numbers are a list, torch's are uint8 tensors.
    """
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    numbers = generator["state"]
    return {
        "python": random.getstate(),
        "numpy": {**generator, "state": {**numbers, "key": numbers["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Any) -> None:
    """Let the generators go on from a state of ``random_state``.

    That of a CUDA device is left out where there is none.

    Raises:
        CheckpointError: it is not such a state.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"not the state of random generators: {error!r}") from error
