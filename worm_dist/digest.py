"""Digests: BLAKE2b of values that ranks compare, SHA-256 of what is on disk, and fingerprints of
tensors that stay on their device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest_of", "fingerprints", "sha256_of"]

_MULTIPLIER, _NEXT = 0x1E3779B97F4A7C15, 0x5851F42D4C957F2D
_AT_ONCE = 2**18
"""Elements that are converted to int64 at once: their factors stay in a processor's cache."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


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


def fingerprints(tensors: Sequence[Tensor]) -> list[int]:
    """64 bits of each tensor's content, computed on its device, with one copy to the host in all.

    The sum modulo 2**64 of its elements' bits, each times an odd number that depends on its place:
    a change of one element always changes it, and other changes do by all but a chance of 2**-64.
    No defence against anybody who wants to deceive; use ``digest_of`` there.

    Args:
        tensors: dense tensors of any shapes and dtypes, all on one device.
    """
    if not tensors:
        return []
    # Products and sums wrap around, and the order of a sum of integers does not matter.
    factors = torch.arange(_AT_ONCE, device=tensors[0].device).mul_(_MULTIPLIER).bitwise_or_(1)
    found: list[int] = torch.stack([_fingerprint(tensor, factors) for tensor in tensors]).tolist()
    return found


def _fingerprint(tensor: Tensor, factors: Tensor) -> Tensor:
    """int64 scalar on the tensor's device."""
    flat = tensor.detach().contiguous().view(-1)
    pieces = flat.view(_INTEGERS[flat.element_size()]).split(len(factors))
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for piece in pieces:
        total = total * _NEXT + (piece.to(torch.int64) * factors[: len(piece)]).sum()
    return total


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
