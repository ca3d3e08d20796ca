"""Digests: BLAKE2b of values that ranks compare, SHA-256 of what is on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest_of", "sha256_of"]


def digest_of(value: Any) -> bytes:
    """Digest, 16 bytes, of a nested value, whatever device its tensors are on.

    Args:
        value: mappings, lists and tuples of tensors, bytes and plain values; the order of a
            mapping's keys does not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        digest.update(part)
    return digest.digest()


def sha256_of(chunks: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the chunks of a file, 64 hexadecimal digits, as ``sha256sum`` shows it."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes | memoryview]:
    """An encoding that is unique for every nested value: kind and length of each part lead."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(value, bytes):
        yield f"bytes {len(value)};".encode()
        yield value
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)};".encode()
        for key in sorted(value):
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"list {len(value)};".encode()
        for part in value:
            yield from _parts(part)
    else:
        text = repr(value).encode()
        yield f"value {len(text)};".encode()
        yield text
