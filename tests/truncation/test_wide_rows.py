"""Rows are written as ``index_copy_`` and ``index_fill_`` write them, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worm_dist.comm_hooks.wide_rows import row_writer, write_rows

_ROWS = torch.tensor([0, 2, 5])
_SHAPES = [(7, 4), (7, 3), (7, 2, 3, 3), (7, 8, 2), (7,), (7, 0)]
_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.complex64]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits at all, NaNs with payloads among them."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_rows_are_written_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, values = _random(shape, dtype), _random((3, *shape[1:]), dtype)
    expected = tensor.clone().index_copy_(0, _ROWS, values)
    write_rows(tensor, _ROWS, values)
    assert torch.equal(_bits(tensor), _bits(expected))
    expected.index_fill_(0, _ROWS, 0)
    row_writer(tensor, _ROWS, None)()
    assert torch.equal(_bits(tensor), _bits(expected))


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_tensors_that_begin_anywhere_in_memory(offset: int) -> None:
    tensor = torch.randn(offset + 7 * 8)[offset:].view(7, 8)
    values = torch.randn(3, 8)
    expected = tensor.clone().index_copy_(0, _ROWS, values)
    write_rows(tensor, _ROWS, values)
    assert torch.equal(tensor, expected)


def test_tensors_whose_memory_is_not_in_the_order_of_their_rows() -> None:
    """Weights in channels_last, and values that are not."""
    tensor = torch.randn(7, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    values = torch.randn(3, 4, 3, 3)
    expected = tensor.clone().index_copy_(0, _ROWS, values)
    write_rows(tensor, _ROWS, values)
    assert torch.equal(tensor, expected)
    row_writer(tensor, _ROWS, None)()
    assert not tensor[_ROWS].any() and torch.equal(tensor[1], expected[1])


def test_a_write_is_counted_as_one_of_the_tensor() -> None:
    """autograd detects that a tensor has been written to by its version."""
    tensor = torch.randn(7, 4)
    before = tensor._version
    write_rows(tensor, _ROWS, torch.randn(3, 4))
    row_writer(tensor, _ROWS, None)()
    assert tensor._version == before + 2
