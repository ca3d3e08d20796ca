"""Random number generator states of Python, numpy and torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError

__all__ = ["random_state", "require_random_state", "restore_random_state"]

_NUMPY_WORDS = 624
"""Length of numpy's key; it does not check its position in it."""


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


def require_random_state(state: Any) -> None:
    """Try states on generators of their own; a CUDA device's only by its type.

    Args:
        state: states as returned by ``random_state``.

    Raises:
        CheckpointError: the state is not of that form.
    """
    attempts: dict[str, Callable[[Any], object]] = {
        "python": random.Random().setstate,
        "numpy": _try_numpy,
        "torch": torch.Generator().set_state,
        "cuda": _try_cuda,
    }
    for name, attempt in attempts.items():
        with _refused(name):
            attempt(state[name])


def _try_numpy(state: Any) -> None:
    np.random.RandomState().set_state(state)
    if not 0 <= state["state"]["pos"] <= _NUMPY_WORDS:
        raise ValueError(f"position {state['state']['pos']}")


def _try_cuda(state: Any) -> None:
    if state is not None and (state.dtype != torch.uint8 or state.dim() != 1):
        raise ValueError("not a vector of bytes")


def restore_random_state(state: Any) -> None:
    """Restore the generators; the state of a CUDA device is ignored where there is none.

    Args:
        state: states as returned by ``random_state``.

    Raises:
        CheckpointError: the state is not of that form.
    """
    with _refused("random"):
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
        text = f"{name}: not the state of random generators: {type(e).__name__}: {str(e)[:200]}"
        raise CheckpointError(text) from e
