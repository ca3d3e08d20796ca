"""Verification of a ticket: digests, metadata, shapes, and that its weights can be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.tensor_meta import TensorMetadata
from ..errors import CheckpointError
from ..ticket.file import WEIGHTS, load_ticket
from ..ticket.metadata import METADATA, Record, read_metadata
from ..ticket.weights import open_weights
from ..training.evaluation import count_parameters

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What was verified of an intact ticket.

    Attributes:
        folder: its folder.
        tensors: number of tensors.
        kept, channels: channels that it keeps, of so many.
        groups: number of channel groups.
        mask_digest: digest of the mask.
        model: name of the model that it was loaded into; None if only the user can build that.
        parameters: number of parameters of the loaded network; None if it was not loaded.
    """

    folder: Path
    tensors: int
    kept: int
    channels: int
    groups: int
    mask_digest: str
    model: str | None
    parameters: int | None

    def __str__(self) -> str:
        said = (
            f"{self.folder}: intact: {self.tensors} tensors, {self.kept:,} of {self.channels:,} "
            f"channels in {self.groups} groups, mask {self.mask_digest}; "
        )
        if self.model is None:
            return said + "not loaded, as only load_ticket(path, build=...) can build its network"
        return said + f"loaded as {self.model} with {self.parameters:,} parameters"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "intact": True, "reason": None}


def verify(folder: Path) -> Verification:
    """Verify a ticket.

    Args:
        folder: the ticket's folder.

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
    return Verification(
        folder=folder,
        tensors=len(tensors),
        kept=kept,
        channels=size,
        groups=len(record.groups),
        mask_digest=record.mask_digest,
        model=None if record.model is None else record.model.name,
        parameters=None if record.model is None else count_parameters(load_ticket(folder)),
    )


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
