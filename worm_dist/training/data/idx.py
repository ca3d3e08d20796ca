"""The IDX format of MNIST and its kin, plain or gzipped.

A big-endian header: two zero bytes, the type of the elements, the number of dimensions, then each
dimension as 32 bits; after it the elements, row by row.
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
    """The uint8 tensor of ``num_dims`` dimensions in the file at ``path``.

    Raises:
        OSError: the file cannot be read, or is damaged as an archive.
        EOFError, zlib.error: so it is too.
        ValueError: it is no IDX file of bytes with that many dimensions.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 * (1 + num_dims)
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, num_dims]) or len(content) < start:
        raise ValueError(f"it is not an IDX file of bytes in {num_dims} dimensions")
    shape = struct.unpack(f">{num_dims}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"it holds {len(content) - start} bytes after the header, which says {shape}"
        )
    # A bytearray, because torch warns of memory that it could not write to.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)
