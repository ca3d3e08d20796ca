"""Tensor metadata (dtype, shape, strides), and conversion between tensors and their bytes."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import CheckpointError
from ..schema import Schema

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
    # Not read by every version of safetensors, so stored as bytes.
    "float8_e4m3fnuz": None,
    "float8_e5m2fnuz": None,
    "float8_e8m0fnu": None,
    "complex128": None,
    "complex64": None,
}
"""Names of dtypes: torch's to those of the safetensors format."""
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _CODES if hasattr(torch, name)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_ELEMENTS = 2**62


def _known(name: str) -> str:
    if name not in _DTYPES:
        raise ValueError(f"dtype {name[:40]!r} is not known to this version of torch")
    return name


_Sizes = Annotated[list[Annotated[int, Field(ge=0, le=_MAX_ELEMENTS)]], Field(max_length=64)]


class TensorMetadata(Schema):
    """Dtype and memory layout of a tensor.

    Attributes:
        dtype: torch's name of the dtype, such as ``float32``.
        shape: sizes of the dimensions.
        strides: strides in elements, for a dense tensor that is not contiguous, such as one in
            channels_last; None for a contiguous layout.
    """

    dtype: Annotated[str, AfterValidator(_known)]
    shape: _Sizes
    strides: _Sizes | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """The metadata of a plain tensor.

        Raises:
            CheckpointError: the tensor is sparse, quantized, on the meta device, or of a subclass.
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
        is_reordered = _is_dense(shape, strides) and strides != _contiguous_strides(shape)
        kept_strides = strides if is_reordered else None
        return cls(dtype=_NAMES[tensor.dtype], shape=shape, strides=kept_strides)

    @classmethod
    def as_stored(cls, code: str, shape: list[int]) -> Self:
        """The metadata of a contiguous tensor in a safetensors file.

        Args:
            code: safetensors' name of the dtype, such as ``F32``.
            shape: sizes of the dimensions.

        Raises:
            ValueError: torch has no such dtype.
        """
        names = {code: name for name, code in _CODES.items() if code is not None}
        return cls(dtype=names.get(code, code), shape=shape)

    @classmethod
    def contiguous(cls, shape: torch.Size, dtype: torch.dtype) -> Self:
        """The metadata of a contiguous tensor.

        Raises:
            CheckpointError: tensors of this dtype cannot be saved.
        """
        return cls.of(torch.empty(0, dtype=dtype)).model_copy(update={"shape": list(shape)})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return _DTYPES[self.dtype]

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of all elements in bytes."""
        return self.num_elements * self.item_size

    @property
    def item_size(self) -> int:
        """Size of an element in bytes."""
        return _DTYPES[self.dtype].itemsize

    @property
    def stored(self) -> tuple[str, list[int]]:
        """Dtype and shape under which the tensor is stored in a safetensors file."""
        code = _CODES[self.dtype]
        if code is None:
            return "U8", [self.num_bytes]
        return code, self.shape if self.strides is None else [self.num_elements]

    @property
    def is_valid(self) -> bool:
        """Whether torch can create such a tensor; metadata from a file may be inconsistent."""
        if math.prod(size for size in self.shape if size) > _MAX_ELEMENTS:
            return False
        return self.strides is None or (
            len(self.strides) == len(self.shape) and _is_dense(self.shape, self.strides)
        )

    def memory_of(self, tensor: Tensor) -> Tensor:
        """The content of a tensor with this metadata, as uint8[num_bytes].

        Returns:
            A view of the tensor's memory; a copy if the tensor is not dense.
        """
        plain = tensor.detach().resolve_conj().resolve_neg()
        if self.strides is None:
            flat = plain.contiguous().view(-1)
        else:
            flat = plain.as_strided((self.num_elements,), (1,))
        return flat.view(torch.uint8)

    def tensor_of(self, memory: Tensor) -> Tensor:
        """A tensor with this metadata that shares the memory of a uint8[num_bytes] tensor."""
        flat = memory.view(_DTYPES[self.dtype])
        if self.strides is None:
            return flat.view(self.shape)
        return flat.as_strided(self.shape, self.strides)


def _is_dense(shape: list[int], strides: list[int]) -> bool:
    """Whether the elements fill a block of memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    # The stride of a dimension of size 1 is arbitrary, but torch detects channels_last by it.
    return expected > 0 and all(stride <= expected for stride in strides)


def _contiguous_strides(shape: list[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
