"""Byte streams: the memory of tensors, sent between ranks in pieces of limited size.

A stream is a sequence of uint8 tensors, one-dimensional, of any sizes and on any device.  However
much is sent, no rank needs more memory for it than one piece, beside where it is sent from and to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["PIECE_BYTES", "fill", "gather_streams", "memory_of", "pieces"]

PIECE_BYTES = 32 << 20
"""Most bytes of one collective on any rank.  At 32 MiB bandwidth counts and no longer the number
of collectives, and beside a network that is worth sharding it is little memory."""


def memory_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: uint8 ``[bytes]``, a view."""
    return tensor.detach().view(-1).view(torch.uint8)


def pieces(stream: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Views of consecutive parts of a stream, of ``limit`` bytes in each piece but the last."""
    piece: list[Tensor] = []
    room = limit
    for part in stream:
        while part.numel():
            view, part = part[:room], part[room:]
            piece.append(view)
            room -= view.numel()
            if not room:
                yield piece
                piece, room = [], limit
    if piece:
        yield piece


def fill(piece: Sequence[Tensor], received: Tensor) -> None:
    """Copy received bytes into the parts of a piece, in order."""
    begin = 0
    for part in piece:
        part.copy_(received[begin : begin + part.numel()])
        begin += part.numel()


def gather_streams(
    stream: Sequence[Tensor],
    place: Callable[[int, int], Sequence[Tensor]],
    group: dist.ProcessGroup | None,
    device: torch.device,
    piece_bytes: int | None = None,
) -> None:
    """Send the stream of every rank to rank zero.  Collective.

    Args:
        stream: this rank's stream.
        place: called on rank zero with each rank and the bytes of its stream; returns a stream of
            so many bytes, which receives them: rank zero's own in the same parts.
        group: the process group; None for that of all ranks.
        device: the device on which its collectives expect their tensors.
        piece_bytes: most bytes at a time on rank zero's device, of all ranks together, at least one
            for each; ``PIECE_BYTES`` if None.  Other ranks need their share of it.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sizes = torch.zeros(size, dtype=torch.int64, device=device)
    sizes[rank] = sum(part.numel() for part in stream)
    dist.all_reduce(sizes, group=group)
    num_bytes: list[int] = sizes.tolist()
    places = [place(other, n) for other, n in enumerate(num_bytes)] if rank == 0 else []
    if rank == 0:
        for part, to in zip(stream, places[0], strict=True):
            to.copy_(part)
        stream = []
    longest = max(num_bytes[1:], default=0)
    width = max(1, min(longest, (piece_bytes or PIECE_BYTES) // size))
    sent = pieces(stream, width)
    received = [pieces(to, width) for to in places[1:]]
    buffer = torch.zeros(width, dtype=torch.uint8, device=device)
    rows = [torch.empty_like(buffer) for _ in range(size)] if rank == 0 else []
    for _ in range(0, longest, width):
        begin = 0
        for part in next(sent, ()):
            buffer[begin : begin + part.numel()] = part
            begin += part.numel()
        dist.gather(buffer, rows or None, group=group, group_dst=0)
        for row, target in zip(rows[1:], received, strict=True):
            fill(next(target, ()), row.cpu())
