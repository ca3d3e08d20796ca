"""Random number generator states of Python, numpy and torch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError

__all__ = ["random_state", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """The states of this process's generators, including that of the current CUDA device.

    Returns:
        A state that a checkpoint can hold, by library; numpy's key is a list of integers, torch's
        states are uint8 tensors.  ``cuda`` is None without a GPU.
    """
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    numpy_state = generator["state"]
    return {
        "python": random.getstate(),
        "numpy": {**generator, "state": {**numpy_state, "key": numpy_state["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Any) -> None:
    """Restore the generators; the state of a CUDA device is ignored where there is none.

    Args:
        state: states as returned by ``random_state``.

    Raises:
        CheckpointError: the state is not of that form.
    """
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"not the state of random generators: {error!r}") from error
