"""Reads and writes named tensors in the safetensors format, which other programs read as well.

The format is eight bytes of header length, a JSON header, then the tensors without gaps.  The
safetensors library is not used, for four reasons: here bytes are hashed as they leave memory, a
full disk raises an error that can be distinguished from others, each tensor gets memory of its own
(the library's tensors share one memory mapping, and reading them crashes if the file is truncated),
and nothing in the file is used before it is validated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from ..errors import CheckpointError
from ..schema import Schema, first_problem
from .durable_io import FileDigest, write_file
from .tensor_meta import TensorMetadata

__all__ = ["TensorFile", "write_tensors"]

_MAX_HEADER_BYTES = 64 << 20

_Size = Annotated[int, Field(ge=0, le=2**62)]


class _Entry(Schema):
    dtype: str
    shape: list[_Size]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


_HEADER = TypeAdapter(dict[str, _Entry])


def write_tensors(path: Path, tensors: Mapping[str, tuple[TensorMetadata, Tensor]]) -> FileDigest:
    """Write a new file and sync it to disk.

    Args:
        path: path of the file, which must not exist.
        tensors: metadata and content of each tensor, by name; the content is uint8[num_bytes] on
            any device.

    Returns:
        Size and hash of the file.

    Raises:
        CheckpointError: the file cannot be written.
    """
    return write_file(path, _chunks(tensors))


def _chunks(tensors: Mapping[str, tuple[TensorMetadata, Tensor]]) -> Iterator[bytes | memoryview]:
    # The widest dtypes first, so that every tensor is aligned to its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1][0].item_size)
    header, end = {}, 0
    for name, (metadata, _) in ordered:
        dtype, shape = metadata.stored
        begin, end = end, end + metadata.num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, (_, memory) in ordered:
        yield memory.cpu().numpy().data


class TensorFile:
    """Reads tensors from an open safetensors file.

    Args:
        file: the open file, positioned at its start.
        size: size of the file in bytes.
        path: path of the file, for messages.

    Raises:
        CheckpointError: the file is not in the safetensors format.
    """

    def __init__(self, file: BufferedReader, size: int, path: Path) -> None:
        self._file = file
        self._path = path
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: wanted a header of at most {min(max(size - 8, 0), _MAX_HEADER_BYTES)} "
                f"bytes, found {length}; it is not a safetensors file"
            )
        self._data_offset = 8 + length
        try:
            self._header = _HEADER.validate_json(file.read(length))
        except ValidationError as error:
            raise CheckpointError(
                f"{path}: not the header of a safetensors file: {first_problem(error)}"
            ) from error
        self._check_offsets(size - self._data_offset)

    @property
    def names(self) -> set[str]:
        """Names of the tensors in the file."""
        return set(self._header)

    def metadata(self, name: str) -> TensorMetadata:
        """The metadata of a tensor according to the file's header.

        Args:
            name: name of the tensor, one of ``names``.

        Raises:
            CheckpointError: torch has no such dtype or shape.
        """
        entry = self._header[name]
        try:
            return TensorMetadata.as_stored(entry.dtype, entry.shape)
        except ValidationError as error:
            raise CheckpointError(
                f"{self._path}: tensor {name[:200]!r}: {first_problem(error)}"
            ) from error

    def offset(self, name: str) -> int:
        """Where in the file the content of a tensor begins, in bytes.

        Args:
            name: name of the tensor, one of ``names``.
        """
        return self._data_offset + self._header[name].data_offsets[0]

    def read(self, name: str, metadata: TensorMetadata) -> Tensor:
        """Read a tensor into newly allocated CPU memory.

        Args:
            name: name of the tensor.
            metadata: expected dtype, shape and strides.

        Raises:
            CheckpointError: there is no tensor of that name with that metadata, or not enough
                memory.
        """
        entry = self._header.get(name)
        if entry is None:
            raise CheckpointError(f"{self._path}: wanted tensor {name[:200]!r}, found none")
        wanted, found = metadata.stored, (entry.dtype, entry.shape)
        begin, end = entry.data_offsets
        if wanted != found or end - begin != metadata.num_bytes or not metadata.is_valid:
            raise CheckpointError(
                f"{self._path}: tensor {name[:200]!r}: wanted {_format(wanted)}, found "
                f"{_format(found)} of {end - begin} bytes"
            )
        try:
            memory = torch.empty(metadata.num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self._path}: tensor {name[:200]!r}: not enough memory for its {end - begin} "
                "bytes"
            ) from error
        self._file.seek(self._data_offset + begin)
        if self._file.readinto(memory.numpy().data) != metadata.num_bytes:
            raise CheckpointError(f"{self._path}: the file was truncated while it was read")
        return metadata.tensor_of(memory)

    def _check_offsets(self, size: int) -> None:
        """Check that the tensors cover the data without gaps or overlaps.

        Args:
            size: size of the data in bytes.

        Raises:
            CheckpointError: they do not.
        """
        end = 0
        for begin, until in sorted(entry.data_offsets for entry in self._header.values()):
            if begin != end or until < begin:
                raise CheckpointError(
                    f"{self._path}: wanted a tensor at byte {end} of the data, found {begin} to "
                    f"{until}"
                )
            end = until
        if end != size:
            raise CheckpointError(f"{self._path}: wanted {end} bytes of tensors, found {size}")


def _format(stored: tuple[str, list[int]]) -> str:
    dtype, shape = stored
    return f"{dtype[:20]} {str(shape)[:100]}"
