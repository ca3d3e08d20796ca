"""Weights of a dense network that has been trained before, from a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.manager import CheckpointManager
from ..checkpoint.sharded_tensor import with_stored_tensors_read
from ..errors import CheckpointError, ConfigError
from .checkpointer import RUN

__all__ = ["load_weights"]


def load_weights(network: nn.Module, path: Path, option: str) -> None:
    """Load weights into the dense network.

    Args:
        network: the network, with the gates that a run would add.
        path: a checkpoint's folder, a ``.safetensors`` file, or a file that ``torch.save`` wrote
            of a state dict, as torchvision's are; nothing in it is executed.
        option: the option or setting that gives it, for messages.

    Raises:
        CheckpointError: the weights cannot be read, or are of another network.
        ConfigError: the file needs a package that is not installed.
    """
    found, wanted = _read(path, option), network.state_dict()
    differing = [
        name
        for name in sorted(found.keys() | wanted.keys())
        if _shape(found, name) != _shape(wanted, name)
    ]
    if differing:
        name = differing[0]
        more = f", and {len(differing) - 1} more differ" if differing[1:] else ""
        raise CheckpointError(
            f"{option}: {path} is of another network, or of one whose channels have been removed: "
            f"{name} is {_shape(found, name)}, not {_shape(wanted, name)}{more}"
        )
    network.load_state_dict(found)


def _read(path: Path, option: str) -> Mapping[str, Tensor]:
    try:
        if path.is_dir():
            # Opened with all files verified: ``read`` does not verify those of sharded tensors.
            state: Any = CheckpointManager.open(path).read(RUN)["network"]
            state = with_stored_tensors_read(state)
        elif path.suffix == ".safetensors":
            state = _read_safetensors(path, option)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{option}: {path} cannot be read: {first}") from error
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{option}: {path} holds no state dict of tensors")
    return state


def _read_safetensors(path: Path, option: str) -> dict[str, Tensor]:
    try:
        # Imported here: it is not among the dependencies.
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigError(
            f"{option}: {path} needs safetensors, which is not installed here; pip install "
            "safetensors, or give a state dict of torch.save"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return f"{list(state[name].shape)}" if name in state else "missing"
