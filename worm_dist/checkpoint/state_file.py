"""A part of a checkpoint: one nested state as two files, its structure (JSON) and its tensors.

A checkpoint has one part or several, such as one for each rank with a state of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from ..errors import CheckpointError
from ..schema import first_problem
from . import tree_json
from .durable_io import FileDigest, open_verified, write_file
from .safetensors_file import TensorFile, write_tensors
from .sharded_tensor import AnyTensor, LocalShards, ShardFiles, StoredTensor, is_shard, shard_path
from .tensor_meta import TensorMetadata

__all__ = ["Packed", "allocate", "pack", "read_part", "write_part", "write_shards"]

_MAX_STRUCTURE_BYTES = 64 << 20
_NAME = re.compile(r"(?!manifest$)[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


class _TensorEntry(TensorMetadata):
    """The JSON object that stands for a tensor in the structure.

    Attributes:
        tensor: name of the tensor in the safetensors file.
        is_sharded: True if its elements are in the files of the ranks; see ``sharded_tensor``.
    """

    tensor: str
    is_sharded: Literal[True] | None = None

    @property
    def metadata(self) -> TensorMetadata:
        """The tensor's metadata alone."""
        return TensorMetadata(dtype=self.dtype, shape=self.shape, strides=self.strides)


@dataclass(frozen=True)
class Packed:
    """A state separated into its structure and its tensors, which share the state's memory.

    Attributes:
        structure: the state as JSON, with an entry in place of each tensor.
        tensors: metadata and content of each tensor, by name; the content is uint8[num_bytes] on
            the tensor's device.
        shards: the same of this rank's parts of sharded tensors; None if there are no sharded ones.
    """

    structure: bytes
    tensors: Mapping[str, tuple[TensorMetadata, Tensor]]
    shards: Mapping[str, tuple[TensorMetadata, Tensor]] | None = None


def pack(state: Any) -> Packed:
    """Separate a state into its structure and its tensors.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.  A
            tensor that occurs twice is stored once, and is a single tensor again when it is read.
            ``LocalShards`` stand for tensors of which each rank packs its own parts, under the same
            key; ``StoredTensor`` for those of an earlier checkpoint.

    Raises:
        CheckpointError: the state contains something else; the message names the key.
    """
    tensors: dict[str, tuple[TensorMetadata, Tensor]] = {}
    names: dict[tuple[Any, ...], str] = {}

    sharded: dict[str, LocalShards | StoredTensor] = {}

    def encode_tensor(key: str, tensor: AnyTensor) -> dict[str, Any]:
        if not isinstance(tensor, Tensor):
            name = tensor.name if isinstance(tensor, StoredTensor) else key.removeprefix(".")
            if sharded.setdefault(name, tensor) is not tensor:  # a.b, and b nested in a
                raise CheckpointError(f"state{key[:200]}: two sharded tensors have this name")
            entry = _TensorEntry(**tensor.metadata.model_dump(), tensor=name, is_sharded=True)
            return entry.model_dump(exclude_none=True)
        try:
            metadata = TensorMetadata.of(tensor)
        except CheckpointError as error:
            raise CheckpointError(f"state{key[:200]}: {error}") from None
        identity = (
            # A conjugate shares its tensor's memory; empty tensors all have data_ptr 0.
            *(tensor.device, tensor.data_ptr() or id(tensor), tensor.is_conj(), tensor.is_neg()),
            *(tensor.dtype, tensor.shape, tensor.stride()),
        )
        if identity not in names:
            name = key.removeprefix(".") or "state"
            while name in tensors or name == "__metadata__":  # a.b may be one key, or two nested
                name += "'"
            names[identity] = name
            tensors[name] = metadata, metadata.memory_of(tensor)
        entry = _TensorEntry(**metadata.model_dump(), tensor=names[identity])
        return entry.model_dump(exclude_none=True)

    structure = tree_json.encode(state, encode_tensor)
    if len(structure) > _MAX_STRUCTURE_BYTES:
        raise CheckpointError(
            f"state: everything but its tensors takes {len(structure)} bytes as JSON, more than "
            f"the limit of {_MAX_STRUCTURE_BYTES}; make tensors of long lists"
        )
    shards = {
        name: (metadata, memory)
        for key, tensor in sharded.items()
        if isinstance(tensor, LocalShards)
        for name, metadata, memory in tensor.stored(key)
    }
    return Packed(structure, tensors, shards if sharded else None)


def allocate(structure: bytes, shards: ShardFiles | None = None) -> tuple[Any, list[Tensor]]:
    """Allocate the tensors of a state that another process has packed.

    Args:
        structure: ``Packed.structure``.
        shards: the files of its sharded tensors, if it has any.

    Returns:
        The state with tensors of any content on the CPU; and the memory of each, uint8[num_bytes],
        in the order of ``Packed.tensors``.

    Raises:
        CheckpointError: it is not the structure of a state.
        MemoryError: this host has no memory for it.
    """
    memory: dict[str, Tensor] = {}

    def allocated(entry: _TensorEntry) -> AnyTensor:
        if entry.is_sharded:
            assert shards is not None
            return shards.tensor(entry.tensor, entry.metadata)
        try:
            memory[entry.tensor] = torch.empty(entry.num_bytes, dtype=torch.uint8)
        except RuntimeError as error:  # torch has no type for it on CPUs
            raise MemoryError(f"state: no memory for {entry.num_bytes} bytes") from error
        return entry.tensor_of(memory[entry.tensor])

    state = _decode(structure, allocated, Path("state"))
    return state, list(memory.values())


def write_shards(folder: Path, part: str, rank: int, packed: Packed) -> dict[str, FileDigest]:
    """Write the file with a rank's parts of sharded tensors and sync it; it is not left if it
    cannot be written, so that a full disk has room again for what the rank reports.

    Args:
        folder: folder to write to.
        part: name of the part.
        rank: the rank, 0 or above.
        packed: the state, with sharded tensors.

    Returns:
        Size and hash of the file, by name.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    assert _NAME.fullmatch(part) and packed.shards is not None, part
    path = shard_path(folder, part, rank)
    try:
        return {path.name: write_tensors(path, packed.shards)}
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


def write_part(folder: Path, part: str, packed: Packed) -> dict[str, FileDigest]:
    """Write the two files of a part and sync them; neither is left if one cannot be written.

    Args:
        folder: folder to write to.
        part: name of the part, of letters, digits, ``_`` and ``-``.
        packed: the state.

    Returns:
        Size and hash of each file, by name.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    assert _NAME.fullmatch(part) and not is_shard(f"{part}.safetensors"), part
    json_path, tensor_path = _paths(folder, part)
    try:
        return {
            tensor_path.name: write_tensors(tensor_path, packed.tensors),
            json_path.name: write_file(json_path, [packed.structure]),
        }
    except BaseException:
        for path in (tensor_path, json_path):
            with suppress(OSError):
                os.unlink(path)
        raise


def read_part(folder: Path, part: str, files: Mapping[str, FileDigest]) -> Any:
    """Read the state of a part; each file is verified before it is parsed.

    Args:
        folder: the checkpoint's folder.
        part: name of the part.
        files: size and hash of the checkpoint's files, by name.

    Returns:
        The state as it was passed to ``pack``, its tensors on the CPU, and a ``StoredTensor`` for
        each that is sharded.

    Raises:
        CheckpointError: a file is missing, damaged or replaced.
    """
    json_path, tensor_path = _paths(folder, part)
    for path in (json_path, tensor_path):
        if path.name not in files:
            raise CheckpointError(f"{path}: wanted this file, found {sorted(files)[:10]}")
    size = files[json_path.name].size
    if size > _MAX_STRUCTURE_BYTES:
        raise CheckpointError(
            f"{json_path}: wanted at most {_MAX_STRUCTURE_BYTES} bytes, found {size}"
        )
    with (
        open_verified(json_path, files[json_path.name]) as json_file,
        open_verified(tensor_path, files[tensor_path.name]) as tensor_file,
    ):
        tensors = TensorFile(tensor_file, files[tensor_path.name].size, tensor_path)
        decoded: set[str] = set()
        shards = ShardFiles(folder, part, files)

        def read(entry: _TensorEntry) -> AnyTensor:
            if entry.is_sharded:
                return shards.tensor(entry.tensor, entry.metadata)
            decoded.add(entry.tensor)
            return tensors.read(entry.tensor, entry)

        state = _decode(json_file.read(), read, json_path)
    if unused := tensors.names - decoded:
        raise CheckpointError(
            f"{tensor_path}: wanted the tensors of {json_path.name}, found "
            f"{min(unused)[:200]!r} as well"
        )
    return state


def _decode(structure: bytes, tensor_of: Callable[[_TensorEntry], AnyTensor], path: Path) -> Any:
    """Decode a state.

    Args:
        structure: the state as JSON.
        tensor_of: function that returns a tensor; called once for each, in the order of ``pack``.
        path: path of the file, for messages.

    Raises:
        CheckpointError: the structure is not valid, or ``tensor_of`` raises it.
    """
    decoded: dict[str, tuple[_TensorEntry, AnyTensor]] = {}

    def decode_tensor(node: dict[str, Any]) -> AnyTensor:
        try:
            entry = _TensorEntry.model_validate(node)
        except ValidationError as error:
            raise CheckpointError(f"{path}: a tensor entry: {first_problem(error)}") from error
        if entry.tensor not in decoded:
            decoded[entry.tensor] = entry, tensor_of(entry)
        first, value = decoded[entry.tensor]
        if first != entry:
            raise CheckpointError(
                f"{path}: wanted equal entries of tensor {entry.tensor[:200]!r}, found two that "
                "differ"
            )
        return value

    return tree_json.decode(structure, decode_tensor, path)


def _paths(folder: Path, part: str) -> tuple[Path, Path]:
    return folder / f"{part}.json", folder / f"{part}.safetensors"
