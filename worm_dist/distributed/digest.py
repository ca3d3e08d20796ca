"""Digest of nested plain values, by which ranks compare their states."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest_of"]


def digest_of(value: Any) -> bytes:
    """Digest, 16 bytes, of a nested plain value, whatever device its tensors are on."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    return digest.digest()


def _parts(value: Any) -> Iterator[bytes]:
    """An encoding as bytes that is unique for every nested value."""
    if isinstance(value, Tensor):
        yield repr((value.dtype, tuple(value.shape))).encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"{{{len(value)}".encode()
        for key in sorted(value):
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for part in value:
            yield from _parts(part)
    else:
        yield repr(value).encode()
