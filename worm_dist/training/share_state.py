"""Sharing of a resumed run's state: one rank reads it, and sends it to the other ranks.

So only that rank's host needs the checkpoint, and it is read and verified once, not by every rank.
What all ranks share is broadcast; what differs from rank to rank is scattered.  Only tensors that
are sharded in the checkpoint are read by every rank, if it can.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.manifest import manifest_digest
from ..checkpoint.sharded_tensor import ShardFiles, with_stored_tensors_read
from ..checkpoint.state_file import Packed, allocate, pack
from ..distributed import byte_streams
from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.byte_streams import fill, pieces
from ..distributed.collectives import Communicator, ProcessGroupComm
from ..errors import CheckpointError
from .checkpointer import RUN
from .rank_state import states_of_ranks

__all__ = ["share_state"]

logger = logging.getLogger(__name__)


def share_state(
    state: Mapping[str, Any] | None,
    device: torch.device,
    source: int = 0,
    path: Path | None = None,
) -> dict[str, Any] | None:
    """Send the trainer's state from one rank to all ranks.  Collective.

    Tensors that are sharded in the checkpoint are not sent if all ranks see its files: each reads
    what it needs of them.  Else they are sent in full.

    Args:
        state: ``Trainer.state_dict()`` as rank zero has saved it, on the source; None for a new run
            and on other ranks.
        device: the device on which collectives expect their tensors.
        source: the rank that has the state, the same on all ranks.
        path: the folder of the checkpoint that it was read from, on the source; needed if tensors
            of it are sharded.

    Returns:
        The state, its tensors on the CPU or in the checkpoint, with this rank's own state ``rank``
        in place of those of all ranks, ``ranks``.  None for a new run.

    Raises:
        CheckpointError: the states of the ranks are malformed, or a rank cannot read the files or
            allocate the state; raised on every rank.
    """
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD, device)
    outgoing = None
    with refused_on_every_rank(comm):
        if state is not None:
            outgoing = _Outgoing.of(state, path)
    if dist.get_rank() != source:
        return _receive(device, source, comm)
    if outgoing is None:
        _broadcast([_numbers([0, 0])], device, source)
        return None
    if comm.size > 1:
        _send(outgoing, device, source, comm)
    return {**outgoing.shared, "rank": outgoing.owns[source]}


@dataclass(frozen=True)
class _Outgoing:
    """What the source sends.

    Attributes:
        shared: the state that all ranks share.
        owns: the state of each rank.
        packed, packed_owns: the same, packed.
        files: JSON of where the checkpoint is and which it is, if tensors of it are sharded.
    """

    shared: Mapping[str, Any]
    owns: Sequence[Any]
    packed: Packed
    packed_owns: Sequence[Packed]
    files: bytes

    @classmethod
    def of(cls, state: Mapping[str, Any], path: Path | None) -> Self:
        owns = _states_of_ranks(state.get("ranks"))
        shared = {key: part for key, part in state.items() if key != "ranks"}
        packed, files = pack(shared), b""
        if packed.shards is not None:
            assert path is not None
            files = json.dumps([str(path.absolute()), manifest_digest(path)]).encode()
        return cls(shared, owns, packed, [pack(own) for own in owns], files)


def _states_of_ranks(saved: Any) -> list[Mapping[str, Any]]:
    try:
        return states_of_ranks(saved, dist.get_world_size())
    except (TypeError, LookupError) as error:
        raise CheckpointError(
            f"--resume: the states of the ranks in the checkpoint are malformed: {error!r}"
        ) from error


def _send(outgoing: _Outgoing, device: torch.device, source: int, comm: Communicator) -> None:
    packed, files = outgoing.packed, outgoing.files
    _broadcast([_numbers([1, len(files)])], device, source)
    if files:
        _broadcast([_bytes(files)], device, source)
        if not _on_all_ranks(True, device):
            with refused_on_every_rank(comm):
                packed = pack(with_stored_tensors_read(outgoing.shared))
    structure = _bytes(packed.structure)
    _broadcast([_numbers([structure.numel()])], device, source)
    _broadcast([structure], device, source)
    with refused_on_every_rank(comm):
        pass  # the other ranks allocate it
    _broadcast([memory for _, memory in packed.tensors.values()], device, source)
    structures = [[_bytes(own.structure)] for own in outgoing.packed_owns]
    memories = [[memory for _, memory in own.tensors.values()] for own in outgoing.packed_owns]
    sizes = [
        max(sum(part.numel() for part in parts) for parts in of_ranks)
        for of_ranks in (structures, memories)
    ]
    _broadcast([_numbers(sizes + [parts[0].numel() for parts in structures])], device, source)
    _scatter(structures, sizes[0], device, source)
    with refused_on_every_rank(comm):
        pass
    _scatter(memories, sizes[1], device, source)


def _receive(device: torch.device, source: int, comm: Communicator) -> dict[str, Any] | None:
    header = _numbers([0, 0])
    _broadcast([header], device, source)
    has_state, num_bytes = _ints(header)
    if not has_state:
        return None
    shards = None
    if num_bytes:
        files = torch.empty(num_bytes, dtype=torch.uint8)
        _broadcast([files], device, source)
        shards = _shard_files(*json.loads(files.numpy().tobytes()))
        if not _on_all_ranks(shards is not None, device):
            shards = None
            with refused_on_every_rank(comm):
                pass  # the source reads them
    size = _numbers([0])
    _broadcast([size], device, source)
    structure = torch.empty(_ints(size)[0], dtype=torch.uint8)
    _broadcast([structure], device, source)
    with refused_on_every_rank(comm):
        shared, memory = allocate(structure.numpy().tobytes(), shards)
    _broadcast(memory, device, source)
    sizes = _numbers([0] * (2 + dist.get_world_size()))
    _broadcast([sizes], device, source)
    most_structure, most_memory, *of_ranks = _ints(sizes)
    structure = torch.empty(of_ranks[dist.get_rank()], dtype=torch.uint8)
    _scattered([structure], most_structure, device, source)
    with refused_on_every_rank(comm):
        own, memory = allocate(structure.numpy().tobytes())
    _scattered(memory, most_memory, device, source)
    return {**shared, "rank": own}


def _shard_files(path: str, digest: str) -> ShardFiles | None:
    """The files of a checkpoint; None if this rank does not see the same checkpoint there."""
    try:
        if manifest_digest(Path(path)) == digest:
            return ShardFiles(Path(path), RUN, Checkpoint(path).manifest.files)
    except CheckpointError as error:
        logger.info("rank %d is sent all of the sharded state: %s", dist.get_rank(), error)
    return None


def _on_all_ranks(flag: bool, device: torch.device) -> bool:
    least = torch.tensor([float(flag)], device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return bool(least > 0)


def _broadcast(parts: Sequence[Tensor], device: torch.device, source: int) -> None:
    """Send tensors, uint8 and one-dimensional, from the source; others receive into theirs."""
    is_source = dist.get_rank() == source
    for piece in pieces(parts, byte_streams.PIECE_BYTES):
        size = sum(part.numel() for part in piece)
        buffer = torch.cat(piece).to(device) if is_source else _empty(size, device)
        dist.broadcast(buffer, src=source)
        if not is_source:
            fill(piece, buffer.cpu())


def _scatter(
    of_ranks: Sequence[Sequence[Tensor]], size: int, device: torch.device, source: int
) -> None:
    """Send tensors of its own to every rank, from the source.

    Args:
        of_ranks: the tensors of each rank, uint8 and one-dimensional.
        size: size of the tensors of the rank that has most, in bytes.
        device: the device on which collectives expect their tensors.
        source: this rank.
    """
    width = _width(size)
    of_each = [pieces(parts, width) for parts in of_ranks]
    for _ in range(0, size, width):
        rows = torch.zeros(len(of_ranks), width, dtype=torch.uint8)
        for row, of_rank in zip(rows, of_each):
            piece = torch.cat([row[:0], *next(of_rank, [])])
            row[: piece.numel()] = piece
        dist.scatter(_empty(width, device), list(rows.to(device)), src=source)


def _scattered(parts: Sequence[Tensor], size: int, device: torch.device, source: int) -> None:
    """Receive what ``_scatter`` sends to this rank into tensors."""
    width = _width(size)
    mine = pieces(parts, width)
    for _ in range(0, size, width):
        buffer = _empty(width, device)
        dist.scatter(buffer, src=source)
        fill(next(mine, []), buffer.cpu())


def _width(size: int) -> int:
    """Bytes that each rank is sent in one scatter."""
    return max(1, min(size, byte_streams.PIECE_BYTES // dist.get_world_size()))


def _empty(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _numbers(values: Sequence[int]) -> Tensor:
    """Integers as bytes, eight for each."""
    return torch.tensor(values, dtype=torch.int64).view(torch.uint8)


def _ints(numbers: Tensor) -> list[int]:
    values: list[int] = numbers.view(torch.int64).tolist()
    return values
