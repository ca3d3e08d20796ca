"""Part: one nested state as two files, its skeleton and its tensors.

A checkpoint has one part, or one for each rank that has a state of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from ..errors import CheckpointError
from . import tree_json
from .durable_io import FileDigest, open_sealed, write_file
from .manifest import complaint
from .safetensors_file import TensorFile, write_tensors
from .tensor_meta import TensorMetadata

__all__ = ["Packed", "pack", "read_part", "write_part"]

_LARGEST_SKELETON = 64 << 20
_NAME = re.compile(r"(?!manifest$)[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


class _Note(TensorMetadata):
    """The object that stands for a tensor in the skeleton."""

    tensor: str


@dataclass(frozen=True)
class Packed:
    """A state taken apart; its tensors are still the memory of the state.

    Attributes:
        skeleton: JSON.
        tensors: form and uint8[num_bytes] by name, on the device of the tensor.
    """

    skeleton: bytes
    tensors: Mapping[str, tuple[TensorMetadata, Tensor]]


def pack(state: Any) -> Packed:
    """Take a state apart.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.  A
            tensor that is there twice is kept once, and is one tensor again when it is read.

    Raises:
        CheckpointError: the state holds something else; the message says where.
    """
    tensors: dict[str, tuple[TensorMetadata, Tensor]] = {}
    names: dict[tuple[Any, ...], str] = {}

    def note(place: str, tensor: Tensor) -> dict[str, Any]:
        try:
            form = TensorMetadata.of(tensor)
        except CheckpointError as error:
            raise CheckpointError(f"state{place[:200]}: {error}") from None
        identity = (
            # A conjugate is a view of the same memory, and so are rows of no elements.
            *(tensor.device, tensor.data_ptr() or id(tensor), tensor.is_conj(), tensor.is_neg()),
            *(tensor.dtype, tensor.shape, tensor.stride()),
        )
        if identity not in names:
            name = place.removeprefix(".") or "state"
            while name in tensors or name == "__metadata__":  # a.b may be one key, or two
                name += "'"
            names[identity] = name
            tensors[name] = form, form.memory_of(tensor)
        return _Note(**form.model_dump(), tensor=names[identity]).model_dump(exclude_none=True)

    content = tree_json.encode(state, note)
    if len(content) > _LARGEST_SKELETON:
        raise CheckpointError(
            f"state: all but its tensors takes {len(content)} bytes, and {_LARGEST_SKELETON} are "
            "read; make tensors of long lists"
        )
    return Packed(content, tensors)


def write_part(folder: Path, part: str, packed: Packed) -> dict[str, FileDigest]:
    """Write the two files of a part, durably; neither is left behind if one cannot be written.

    Returns:
        What the files must be, by name.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    assert _NAME.fullmatch(part), part
    plan, data = _files(folder, part)
    try:
        return {
            data.name: write_tensors(data, packed.tensors),
            plan.name: write_file(plan, [packed.skeleton]),
        }
    except BaseException:
        for path in (data, plan):
            with suppress(OSError):
                os.unlink(path)
        raise


def read_part(folder: Path, part: str, seals: Mapping[str, FileDigest]) -> Any:
    """The state of a part, its tensors on the CPU.  Nothing is parsed before it is compared.

    Raises:
        CheckpointError: a file is missing, damaged or not what was sealed.
    """
    plan, data = _files(folder, part)
    for path in (plan, data):
        if path.name not in seals:
            raise CheckpointError(f"{path}: wanted this file, found {sorted(seals)[:10]}")
    size = seals[plan.name].size
    if size > _LARGEST_SKELETON:
        raise CheckpointError(f"{plan}: wanted at most {_LARGEST_SKELETON} bytes, found {size}")
    with (
        open_sealed(plan, seals[plan.name]) as plan_file,
        open_sealed(data, seals[data.name]) as data_file,
    ):
        tensors = TensorFile(data_file, seals[data.name].size, data)
        found: dict[str, tuple[_Note, Tensor]] = {}

        def tensor(node: dict[str, Any]) -> Tensor:
            try:
                note = _Note.model_validate(node)
            except ValidationError as error:
                raise CheckpointError(f"{plan}: a tensor's note: {complaint(error)}") from error
            if note.tensor not in found:
                found[note.tensor] = note, tensors.read(note.tensor, note)
            first, value = found[note.tensor]
            if first != note:
                raise CheckpointError(
                    f"{plan}: wanted one form of tensor {note.tensor[:200]!r}, found two"
                )
            return value

        state = tree_json.decode(plan_file.read(), tensor, plan)
    if unused := tensors.names - found.keys():
        raise CheckpointError(
            f"{data}: wanted the tensors of {plan.name}, found {min(unused)[:200]!r} as well"
        )
    return state


def _files(folder: Path, part: str) -> tuple[Path, Path]:
    return folder / f"{part}.json", folder / f"{part}.safetensors"
