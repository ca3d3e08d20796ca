"""Ticket weights: ``ticket.safetensors``, the state dict of a drawn network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.durable_io import FileDigest, open_verified
from ..checkpoint.safetensors_file import TensorFile, write_tensors
from ..checkpoint.tensor_meta import TensorMetadata
from ..errors import CheckpointError
from ..groups.finite_values import finite_names

__all__ = ["Weights", "open_weights", "write_weights"]


def write_weights(path: Path, network: nn.Module) -> FileDigest:
    """Write parameters and buffers, replacing the file atomically.

    Raises:
        CheckpointError: the disk is full or cannot be written, or the network's state dict has a
            value that is not a tensor.
    """
    tensors = {}
    for name, value in _unique_state(network).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: the network's state {name!r} is not a tensor and cannot be saved"
            )
        plain = value.detach().contiguous()  # the file format has no strides
        metadata = TensorMetadata.of(plain)
        tensors[name] = metadata, metadata.memory_of(plain)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            staged.unlink()
        digest = write_tensors(staged, tensors)
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise
    return digest


@contextmanager
def open_weights(path: Path, digest: FileDigest) -> Iterator[Weights]:
    """Open the file after verifying its size and digest.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    with open_verified(path, digest) as file:
        yield Weights(TensorFile(file, digest.size, path), path)


class Weights:
    """An open weights file."""

    def __init__(self, file: TensorFile, path: Path) -> None:
        self._file = file
        self._path = path

    def __len__(self) -> int:
        return len(self._file.names)

    @property
    def metadata(self) -> dict[str, TensorMetadata]:
        """The dtype and shape of every tensor, by name in alphabetical order.

        Raises:
            CheckpointError: torch has no such dtype or shape.
        """
        return {name: self._file.metadata(name) for name in sorted(self._file.names)}

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: there is no such tensor, or not enough memory.
        """
        return self._file.read(name, self._file.metadata(name))

    def check(self, network: nn.Module) -> None:
        """Compare names, shapes and dtypes with the network, without reading weights.

        Raises:
            CheckpointError: names or shapes differ, or the network's dtype cannot hold every value.
        """
        here = _unique_state(network)
        wanted = {name: list(value.shape) for name, value in here.items()}
        found = {name: self._file.metadata(name).shape for name in self._file.names}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"{self._path}: its tensors do not fit the network: {name[:100]!r} is "
                    f"{found.get(name, 'not there')}, not {wanted.get(name, 'expected')}"
                )
        for name, value in here.items():
            saved = getattr(torch, self._file.metadata(name).dtype)
            if not _holds(value.dtype, saved):
                raise CheckpointError(
                    f"{self._path}: its tensors do not fit the network: {name[:100]!r} is {saved}, "
                    f"and {value.dtype} in the network; let build return it in the precision of "
                    "the ticket, and convert it afterwards"
                )

    def fill(self, network: nn.Module) -> None:
        """Load the weights into the network, converted to its dtypes.

        Raises:
            CheckpointError: weights or running statistics are NaN or infinite.
        """
        state = network.state_dict()  # keeps the layers' version metadata, which some need
        finite = finite_names(network)
        for name in _unique_state(network):
            state[name] = self.read(name)
            if name in finite and not bool(state[name].isfinite().all()):
                raise CheckpointError(
                    f"{self._path}: {name[:100]!r} has NaN or infinite elements; it is of no use"
                )
        network.load_state_dict(state)


def _holds(dtype: torch.dtype, saved: torch.dtype) -> bool:
    """Whether a dtype has every value of another one of the same kind."""
    if dtype == saved:
        return True
    kind, saved_kind = ((d.is_floating_point, d.is_complex) for d in (dtype, saved))
    if kind != saved_kind or kind == (False, False):
        return False
    here, there = torch.finfo(dtype), torch.finfo(saved)
    return here.eps <= there.eps and here.max >= there.max


def _unique_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict; of shared tensors only the first name."""
    state = network.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    return {
        name: value for name, value in state.items() if name == first.setdefault(id(value), name)
    }
