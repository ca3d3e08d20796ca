"""Weights: ``ticket.safetensors``, the whole state of a drawn network by its names in torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor, nn

from ..checkpoint.durable_io import FileDigest, open_sealed
from ..checkpoint.safetensors_file import TensorFile, write_tensors
from ..checkpoint.tensor_meta import TensorMetadata
from ..errors import CheckpointError

__all__ = ["Weights", "open_weights", "write_weights"]


def write_weights(path: Path, network: nn.Module) -> FileDigest:
    """Write parameters and buffers; a reader sees the old file or the new one, never a part.

    Raises:
        CheckpointError: the disk is full or cannot be written, or the network has a state that is
            no tensor.
    """
    tensors = {}
    for name, value in _distinct(network).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: the network's state {name!r} is no tensor and cannot be saved in a ticket"
            )
        plain = value.detach().contiguous()  # other programs know of no other order
        form = TensorMetadata.of(plain)
        tensors[name] = form, form.memory_of(plain)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            staged.unlink()
        seal = write_tensors(staged, tensors)
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise
    return seal


@contextmanager
def open_weights(path: Path, seal: FileDigest) -> Iterator[Weights]:
    """The file, once its bytes have been compared with the seal.

    Raises:
        CheckpointError: it is missing, damaged or not in the format.
    """
    with open_sealed(path, seal) as file:
        yield Weights(TensorFile(file, seal.size, path), path)


class Weights:
    """An open file of weights."""

    def __init__(self, file: TensorFile, path: Path) -> None:
        self._file = file
        self._path = path

    def __len__(self) -> int:
        return len(self._file.names)

    def check(self, network: nn.Module) -> None:
        """Compare names and shapes with the network, without reading a weight.

        Raises:
            CheckpointError: they do not fit.
        """
        wanted = {name: list(value.shape) for name, value in _distinct(network).items()}
        found = {name: self._file.form(name).shape for name in self._file.names}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"{self._path}: its tensors do not fit the network: {name[:100]!r} is "
                    f"{found.get(name, 'not there')}, not {wanted.get(name, 'expected')}"
                )

    def fill(self, network: nn.Module) -> None:
        """Give the network its weights; numbers become those of the network's dtypes."""
        state = network.state_dict()  # with the versions of its layers, which some insist on
        for name in _distinct(network):
            state[name] = self._file.read(name, self._file.form(name))
        network.load_state_dict(state)


def _distinct(network: nn.Module) -> dict[str, Tensor]:
    """The state, of what is there by several names only the first."""
    state = network.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    return {
        name: value for name, value in state.items() if name == first.setdefault(id(value), name)
    }
