"""Wide rows: write rows of a tensor on a CPU in elements of 16 bytes.

torch's ``index_copy_`` and ``index_fill_`` move one element at a time on a CPU, whatever its size:
rows of float32 take up to twice as long as the same bytes in the largest dtype there is.  The bits
that are written are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

__all__ = ["row_writer", "write_rows"]

_WIDEST = torch.complex128


def write_rows(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write rows of a tensor.

    Args:
        tensor: ``[n, ...]``.
        rows: int64 indices of different rows.
        values: ``[len(rows), ...]``, of the same dtype.
    """
    row_writer(tensor, rows, values)()


def row_writer(tensor: Tensor, rows: Tensor, values: Tensor | None) -> Callable[[], object]:
    """A function that writes what ``values`` has then to rows of a tensor, or zeros; the arguments
    are those of ``write_rows``."""
    if values is None:
        (wide,) = _wide(tensor)
        return partial(wide.index_fill_, 0, rows, 0)
    wide, wide_values = _wide(tensor, values)
    return partial(wide.index_copy_, 0, rows, wide_values)


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
