"""Wide rows: write rows of a tensor on a CPU in elements of 16 bytes.

torch's ``index_copy_`` and ``index_fill_`` move one element at a time on a CPU, whatever its size:
rows of float32 take up to twice as long as the same bytes in the largest dtype there is.  The bits
that are written are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["fill_rows_with_zeros", "write_rows"]

_WIDEST = torch.complex128


def write_rows(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write rows of a tensor.

    Args:
        tensor: ``[n, ...]``.
        rows: int64 indices of different rows.
        values: ``[len(rows), ...]``, of the same dtype.
    """
    wide, wide_values = _wide(tensor, values)
    wide.index_copy_(0, rows, wide_values)


def fill_rows_with_zeros(tensor: Tensor, rows: Tensor) -> None:
    """Set rows of a tensor to zero; the arguments are those of ``write_rows``."""
    (wide,) = _wide(tensor)
    wide.index_fill_(0, rows, 0)


def _wide(*tensors: Tensor) -> Sequence[Tensor]:
    """Views of the tensors with the same rows, in the widest dtype if they are contiguous, on a
    CPU, and hold whole elements of that dtype; otherwise the tensors themselves."""
    per_element, rest = divmod(_WIDEST.itemsize, tensors[0].dtype.itemsize)
    row_size = tensors[0].shape[1:].numel()
    fits = rest == 0 and row_size > 0 and row_size % per_element == 0
    if not fits or not all(
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.storage_offset() % per_element == 0
        for tensor in tensors
    ):
        return tensors
    return [tensor.detach().view(-1, row_size).view(_WIDEST) for tensor in tensors]
