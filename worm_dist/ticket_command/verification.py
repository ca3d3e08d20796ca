"""Verification of a ticket: digests, metadata, shapes, and that its weights can be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..checkpoint.tensor_meta import TensorMetadata
from ..errors import CheckpointError
from ..ticket.file import WEIGHTS, load_ticket
from ..ticket.metadata import METADATA, Record, read_metadata
from ..ticket.weights import open_weights
from ..training.evaluation import count_parameters

__all__ = ["verify"]


def verify(folder: Path) -> str:
    """Verify a ticket.

    Args:
        folder: the ticket's folder.

    Returns:
        One line on what was verified.

    Raises:
        CheckpointError: the ticket is missing or damaged, contradicts itself, or does not fit the
            network that it names.
    """
    record = read_metadata(folder)
    with open_weights(folder / WEIGHTS, record.weights) as weights:
        tensors = weights.metadata
    for contradiction in _contradictions(record, tensors):
        raise CheckpointError(f"{folder / METADATA}: {contradiction}; a file was changed")
    kept = sum(len(group.kept) for group in record.groups)
    size = sum(group.num_channels for group in record.groups)
    said = (
        f"{folder}: intact: {len(tensors)} tensors, {kept:,} of {size:,} channels in "
        f"{len(record.groups)} groups, mask {record.mask_digest}; "
    )
    if record.model is None:
        return said + "not loaded, as only load_ticket(path, build=...) can build its network"
    num_parameters = count_parameters(load_ticket(folder))
    return said + f"loaded as {record.model.name} with {num_parameters:,} parameters"


def _contradictions(record: Record, tensors: Mapping[str, TensorMetadata]) -> Iterator[str]:
    """Cuts and groups that do not fit the shapes of the weights."""
    for cut in record.cuts:
        shape = tensors[cut.parameter].shape if cut.parameter in tensors else None
        if shape is None or cut.dim >= len(shape) or shape[cut.dim] != len(cut.kept):
            yield (
                f"its cut of {cut.parameter[:100]!r} keeps {len(cut.kept)} in dimension {cut.dim}, "
                f"but the weights have {shape or 'no such tensor'}"
            )
    for group in record.groups:
        # A channel of a group takes one or more rows of the module that the group is named after.
        dropped = group.num_channels - len(group.kept)
        rows = [cut.size - len(cut.kept) for cut in record.cuts if cut.module == group.name]
        if dropped > max(rows, default=0):
            yield (
                f"group {group.name[:100]!r} drops {dropped} channels, but its module loses "
                f"{max(rows, default=0)} rows"
            )
