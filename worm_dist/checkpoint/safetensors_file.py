"""Tensor file: tensors by name in the safetensors format, which other programs read as well.

The format is eight bytes of length, that much JSON, then the tensors without gaps.  It is written
and read here, and not by the library: so bytes are hashed as they leave memory, a full disk is an
error that can be told from others, each tensor gets memory of its own (the library's share one
mapping of the file, and die if the file is cut short), and nothing in the file is believed before
it has been compared.
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
from .durable_io import FileDigest, Part, write_file
from .manifest import complaint
from .tensor_meta import TensorMetadata

__all__ = ["TensorFile", "write_tensors"]

_LARGEST_HEADER = 64 << 20

_Size = Annotated[int, Field(ge=0, le=2**62)]


class _Entry(Part):
    dtype: str
    shape: list[_Size]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]


_HEADER = TypeAdapter(dict[str, _Entry])


def write_tensors(path: Path, tensors: Mapping[str, tuple[TensorMetadata, Tensor]]) -> FileDigest:
    """Write a new file, durably.

    Args:
        path: of the file.
        tensors: form and uint8[num_bytes] by name, on any device.

    Raises:
        CheckpointError: it cannot be written.
    """
    return write_file(path, _chunks(tensors))


def _chunks(tensors: Mapping[str, tuple[TensorMetadata, Tensor]]) -> Iterator[bytes | memoryview]:
    # The widest numbers first, so that each begins at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1][0].item_size)
    header, end = {}, 0
    for name, (form, _) in ordered:
        dtype, shape = form.stored
        begin, end = end, end + form.num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, (_, memory) in ordered:
        yield memory.cpu().numpy().data


class TensorFile:
    """Reads tensors out of an open file.

    Args:
        file: at its beginning.
        size: of the file in bytes.
        path: for messages.

    Raises:
        CheckpointError: it is not in the format.
    """

    def __init__(self, file: BufferedReader, size: int, path: Path) -> None:
        self._file = file
        self._path = path
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(
                f"{path}: wanted a header of at most {min(max(size - 8, 0), _LARGEST_HEADER)} "
                f"bytes, found {length}; it is not a safetensors file"
            )
        self._begin = 8 + length
        try:
            self._header = _HEADER.validate_json(file.read(length))
        except ValidationError as error:
            raise CheckpointError(
                f"{path}: not the header of a safetensors file: {complaint(error)}"
            ) from error
        self._check_offsets(size - self._begin)

    @property
    def names(self) -> set[str]:
        return set(self._header)

    def form(self, name: str) -> TensorMetadata:
        """Of a tensor in the file, if nothing else says what it is.

        Raises:
            CheckpointError: its dtype or shape is not one of torch's.
        """
        entry = self._header[name]
        try:
            return TensorMetadata.as_stored(entry.dtype, entry.shape)
        except ValidationError as error:
            raise CheckpointError(
                f"{self._path}: tensor {name[:200]!r}: {complaint(error)}"
            ) from error

    def read(self, name: str, form: TensorMetadata) -> Tensor:
        """A tensor on the CPU, in memory of its own.

        Raises:
            CheckpointError: there is no tensor of that name and form, or no memory for it.
        """
        entry = self._header.get(name)
        if entry is None:
            raise CheckpointError(f"{self._path}: wanted tensor {name[:200]!r}, found none")
        wanted, found = form.stored, (entry.dtype, entry.shape)
        begin, end = entry.data_offsets
        if wanted != found or end - begin != form.num_bytes or not form.is_possible:
            raise CheckpointError(
                f"{self._path}: tensor {name[:200]!r}: wanted {_shown(wanted)}, found "
                f"{_shown(found)} of {end - begin} bytes"
            )
        try:
            memory = torch.empty(form.num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self._path}: tensor {name[:200]!r}: there is no memory for its {end - begin} "
                "bytes"
            ) from error
        self._file.seek(self._begin + begin)
        if self._file.readinto(memory.numpy().data) != form.num_bytes:
            raise CheckpointError(f"{self._path}: the file was cut short while it was read")
        return form.tensor_of(memory)

    def _check_offsets(self, size: int) -> None:
        """Tensors lie one after another, without gaps, to the end of the file."""
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


def _shown(stored: tuple[str, list[int]]) -> str:
    dtype, shape = stored
    return f"{dtype[:20]} {str(shape)[:100]}"
