"""Reader of the IDX format of MNIST, plain or gzipped.

The header is big-endian: two zero bytes, the type of the elements, the number of dimensions, then
each dimension as 32 bits.  The elements follow in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

__all__: list[str] = []

UNSIGNED_BYTE = 8


def read_idx(path: Path, num_dims: int) -> Tensor:
    """Read a uint8 tensor with ``num_dims`` dimensions from an IDX file.

    Raises:
        OSError: the file cannot be read, or its archive is damaged.
        EOFError, zlib.error: its archive is damaged.
        ValueError: it is not an IDX file of bytes with that many dimensions.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 * (1 + num_dims)
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, num_dims]) or len(content) < start:
        raise ValueError(f"it is not an IDX file of bytes in {num_dims} dimensions")
    shape = struct.unpack(f">{num_dims}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"it has {len(content) - start} bytes after the header, which declares shape {shape}"
        )
    # A bytearray, because torch warns about read-only memory.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)
