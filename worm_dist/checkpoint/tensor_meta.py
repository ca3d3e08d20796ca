"""Form: dtype, shape and strides of a tensor, and the bytes that it is made of."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import CheckpointError
from .durable_io import Part

__all__ = ["TensorMetadata"]

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    # What not every version of safetensors reads is stored as bytes.
    "float8_e4m3fnuz": None,
    "float8_e5m2fnuz": None,
    "float8_e8m0fnu": None,
    "complex128": None,
    "complex64": None,
}
"""torch's name of a dtype, and that of the safetensors format."""
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _CODES if hasattr(torch, name)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST = 2**62


def _known(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"dtype {name[:40]!r} is not known to this version of torch")
    return name


_Sizes = Annotated[list[Annotated[int, Field(ge=0, le=_LARGEST)]], Field(max_length=64)]


class TensorMetadata(Part):
    """What a tensor is besides its bytes.

    Attributes:
        dtype: torch's name of it.
        shape: sizes of the dimensions.
        strides: None for rows one after another; else of a tensor that fills its memory in
            another order, such as channels_last.
    """

    dtype: Annotated[str, AfterValidator(_known)]
    shape: _Sizes
    strides: _Sizes | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Of a plain tensor.

        Raises:
            CheckpointError: it is sparse, quantized, without memory, or of a subclass.
        """
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.layout is not torch.strided
            or tensor.is_meta
            or tensor.dtype not in _NAMES
        ):
            raise CheckpointError(
                f"a {type(tensor).__name__} of {tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device} cannot be saved; make it a plain tensor"
            )
        shape, strides = list(tensor.shape), list(tensor.stride())
        keeps = _fills_memory(shape, strides) and strides != _rows_first(shape)
        return cls(dtype=_NAMES[tensor.dtype], shape=shape, strides=strides if keeps else None)

    @classmethod
    def as_stored(cls, code: str, shape: list[int]) -> Self:
        """Of a tensor that another program has written: rows one after another.

        Raises:
            ValueError: torch has no such dtype.
        """
        names = {code: name for name, code in _CODES.items() if code is not None}
        return cls(dtype=names.get(code, code), shape=shape)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.item_size

    @property
    def item_size(self) -> int:
        return _DTYPES[self.dtype].itemsize

    @property
    def stored(self) -> tuple[str, list[int]]:
        """dtype and shape in a safetensors file."""
        code = _CODES[self.dtype]
        if code is None:
            return "U8", [self.num_bytes]
        return code, self.shape if self.strides is None else [self.num_elements]

    @property
    def is_possible(self) -> bool:
        """Whether torch can make it: from bytes that may not be ours."""
        if math.prod(size for size in self.shape if size) > _LARGEST:
            return False
        return self.strides is None or (
            len(self.strides) == len(self.shape) and _fills_memory(self.shape, self.strides)
        )

    def memory_of(self, tensor: Tensor) -> Tensor:
        """uint8[num_bytes]: the memory of a tensor of this form; a copy only if it has gaps."""
        plain = tensor.detach().resolve_conj().resolve_neg()
        if self.strides is None:
            flat = plain.contiguous().view(-1)
        else:
            flat = plain.as_strided((self.num_elements,), (1,))
        return flat.view(torch.uint8)

    def tensor_of(self, memory: Tensor) -> Tensor:
        """The tensor of this form in uint8[num_bytes], which it keeps."""
        flat = memory.view(_DTYPES[self.dtype])
        if self.strides is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.strides)


def _fills_memory(shape: list[int], strides: list[int]) -> bool:
    """Every element has a place of its own, and no place is left over."""
    wanted = 1
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n != 1):
        if stride != wanted:
            return False
        wanted *= size
    # The stride along a single element means nothing, but tells channels_last from rows.
    return wanted > 0 and all(stride <= wanted for stride in strides)


def _rows_first(shape: list[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
