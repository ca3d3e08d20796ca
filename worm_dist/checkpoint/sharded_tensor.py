"""Sharded tensors: each rank writes the elements that it has, and any rank reads any range of them.

Their elements are in files of their own, one for each rank that wrote, as tensors that are named
after the sharded tensor and the index of their first element: ``NAME@BEGIN``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from pydantic import AfterValidator
from torch import Tensor

from ..errors import CheckpointError
from .durable_io import FileDigest, check_size, file_size, open_plain, reading
from .safetensors_file import TensorFile
from .tensor_meta import TensorMetadata

__all__ = [
    "AnyTensor",
    "LocalShards",
    "SavedTensor",
    "ShardFiles",
    "StoredTensor",
    "has_shards",
    "is_shard",
    "shard_path",
    "with_stored_tensors_read",
]

_SHARD = re.compile(r".*_shard-[0-9]+\.safetensors")


@dataclass(frozen=True, eq=False)
class LocalShards:
    """A tensor of which this rank has some elements, to be saved; it may have none.

    Attributes:
        shape: shape of the full tensor.
        dtype: its dtype.
        parts: index of the first element in the flattened tensor, and consecutive elements.
    """

    shape: torch.Size
    dtype: torch.dtype
    parts: Sequence[tuple[int, Tensor]]

    @property
    def metadata(self) -> TensorMetadata:
        """Metadata of the full tensor."""
        return TensorMetadata.contiguous(self.shape, self.dtype)

    def stored(self, name: str) -> Iterator[tuple[str, TensorMetadata, Tensor]]:
        """Name, metadata and content, as in ``Packed``, of each part.

        Args:
            name: name of the sharded tensor.
        """
        for begin, elements in self.parts:
            flat = elements.detach().reshape(-1)
            metadata = TensorMetadata.of(flat)
            yield f"{name}@{begin}", metadata, metadata.memory_of(flat)


class _Part(NamedTuple):
    """Consecutive elements in a file: the first one's index, their number, and their place."""

    begin: int
    length: int
    path: Path
    offset: int


class StoredTensor:
    """A sharded tensor in the files of a checkpoint, of which ranges are read when they are needed.

    Args:
        name: its name.
        metadata: its metadata.
        parts: its parts, in any order; they may overlap.

    Attributes:
        shape: its shape.
        dtype: its dtype.

    Raises:
        CheckpointError: elements are missing.
    """

    def __init__(self, name: str, metadata: TensorMetadata, parts: Sequence[_Part]) -> None:
        self.name = name
        self.metadata = metadata
        self.shape = torch.Size(metadata.shape)
        self.dtype = metadata.torch_dtype
        self._parts: list[_Part] = []
        end = 0
        for part in sorted(parts):
            if part.begin > end:
                break
            if part.begin + part.length > end:
                self._parts.append(part)
                end = part.begin + part.length
        if end != metadata.num_elements:
            raise CheckpointError(
                f"tensor {name[:200]!r}: wanted {metadata.num_elements} elements, found the first "
                f"{end} in the files of the ranks"
            )

    def read(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Read consecutive elements of the flattened tensor.

        Args:
            begin: index of the first one.
            end: index after the last one; None for the end of the tensor.

        Returns:
            The elements, one-dimensional, on the CPU.

        Raises:
            CheckpointError: a file is missing or cannot be read.
        """
        end = self.metadata.num_elements if end is None else end
        try:
            elements = torch.empty(end - begin, dtype=self.dtype)
        except RuntimeError as error:
            raise CheckpointError(
                f"tensor {self.name[:200]!r}: not enough memory for {end - begin} elements"
            ) from error
        size, memory = self.metadata.item_size, elements.view(torch.uint8).numpy().data
        for part in self._parts:
            first, last = max(begin, part.begin), min(end, part.begin + part.length)
            if first >= last:
                continue
            with reading(part.path), open_plain(part.path) as file:
                file.seek(part.offset + (first - part.begin) * size)
                wanted = memory[(first - begin) * size : (last - begin) * size]
                if file.readinto(wanted) != len(wanted):
                    raise CheckpointError(f"{part.path}: the file was truncated while it was read")
        return elements


AnyTensor: TypeAlias = Tensor | LocalShards | StoredTensor
"""A tensor, or what stands for one that is sharded: before it is saved, and after."""


def _require_tensor(value: Any) -> Tensor | StoredTensor:
    if not isinstance(value, (Tensor, StoredTensor)):
        raise ValueError("must be a tensor")
    return value


SavedTensor = Annotated[Any, AfterValidator(_require_tensor)]
"""A tensor in the schema of a saved state: sharded ones are not read until they are needed."""


class ShardFiles:
    """The files with the sharded tensors of a part of a checkpoint.

    Their hashes are not verified here: see ``Checkpoint.verify``.

    Args:
        folder: the checkpoint's folder.
        part: name of the part.
        files: size and hash of the checkpoint's files, by name.

    Raises:
        CheckpointError: a file is missing or not in the safetensors format.
    """

    def __init__(self, folder: Path, part: str, files: Mapping[str, FileDigest]) -> None:
        self._parts: dict[str, list[tuple[TensorMetadata, _Part]]] = {}
        number = 0
        while (path := shard_path(folder, part, number)).name in files:
            number += 1
            digest = files[path.name]
            check_size(path, file_size(path), digest)
            with reading(path), open_plain(path) as file:
                tensors = TensorFile(file, digest.size, path)
            for stored in tensors.names:
                name, _, begin = stored.rpartition("@")
                if not begin.isdecimal():
                    raise CheckpointError(f"{path}: wanted NAME@BEGIN, found {stored[:200]!r}")
                metadata = tensors.metadata(stored)
                found = _Part(int(begin), metadata.num_elements, path, tensors.offset(stored))
                self._parts.setdefault(name, []).append((metadata, found))
        self.count = number

    def tensor(self, name: str, metadata: TensorMetadata) -> StoredTensor:
        """A sharded tensor.

        Args:
            name: its name.
            metadata: its metadata.

        Raises:
            CheckpointError: elements are missing, or of another dtype.
        """
        found = self._parts.get(name, [])
        for own, part in found:
            if own.dtype != metadata.dtype:
                raise CheckpointError(
                    f"{part.path}: tensor {name[:200]!r}: wanted {metadata.dtype}, found "
                    f"{own.dtype}"
                )
        return StoredTensor(name, metadata, [part for _, part in found])


def has_shards(state: Any) -> bool:
    """Whether there are ``LocalShards`` in nested dicts."""
    if isinstance(state, Mapping):
        return any(map(has_shards, state.values()))
    return isinstance(state, LocalShards)


def only_shards(state: Mapping[str, Any]) -> dict[str, Any]:
    """The ``LocalShards`` of nested dicts, under their keys, and nothing else."""
    return {
        key: only_shards(value) if isinstance(value, Mapping) else value
        for key, value in state.items()
        if has_shards(value)
    }


def with_stored_tensors_read(state: Any) -> Any:
    """A nested state with a full tensor in place of each ``StoredTensor``.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    if isinstance(state, Mapping):
        return {key: with_stored_tensors_read(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(with_stored_tensors_read, state))
    return state.read().view(state.shape) if isinstance(state, StoredTensor) else state


def is_shard(name: str) -> bool:
    """Whether a file name is one of ``shard_path``."""
    return _SHARD.fullmatch(name) is not None


def shard_path(folder: Path, part: str, rank: int) -> Path:
    """The file with a rank's share of a part's sharded tensors."""
    return folder / f"{part}_shard-{rank}.safetensors"
