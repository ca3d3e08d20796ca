"""Ticket metadata: ``ticket.json`` with the dense network's builder and the cuts."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ..checkpoint.durable_io import FileDigest, read_small
from ..digest import sha256_of
from ..errors import CheckpointError, ConfigError
from ..groups.channel_groups import ChannelGroup
from ..groups.mask import Mask
from ..pruning.surgery import Cut
from ..schema import Schema, first_problem

__all__ = ["METADATA", "CutRecord", "GroupRecord", "ModelRecord", "Record", "read_metadata"]

METADATA = "ticket.json"

_FORMAT_VERSION = 5
_FIELDS_SINCE_5 = frozenset({"input_shape", "settings"})
"""Tickets of format 4, which are read too, do not have these."""
_MAX_BYTES = 64 << 20
"""The largest accepted file in bytes; 100 times what torchvision's largest networks need."""
_MAX_CHANNELS = 1 << 24
"""Of a group, and of all groups together: masks take memory."""


def _ascending(indices: list[int]) -> list[int]:
    if not all(one < other for one, other in zip([-1, *indices], indices, strict=False)):
        raise ValueError("must be different indices, in order")
    return indices


_Indices = Annotated[list[int], Field(min_length=1), AfterValidator(_ascending)]


class ModelRecord(Schema):
    """The arguments of ``worm_dist.models.build_model``: a name and plain values.

    The name may be that of a user's function, which loading does not call by itself.
    """

    name: str
    num_classes: int
    in_channels: int
    arguments: dict[str, Any] = Field(default_factory=dict)


class GroupRecord(Schema):
    """The kept channels of one group; loading uses the cuts, and compares them with these."""

    name: str
    num_channels: Annotated[int, Field(ge=1, le=_MAX_CHANNELS)]
    kept: _Indices

    @property
    def keep(self) -> Tensor:
        """The mask of this group, bool ``[num_channels]``."""
        return _flags_of(self.kept, self.num_channels)

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        _require_below(self.kept, self.num_channels)
        return self

    @classmethod
    def of(cls, group: ChannelGroup, keep: Tensor) -> Self:
        return cls(name=group.name, num_channels=group.num_channels, kept=_indices_of(keep))


class CutRecord(Schema):
    """A ``surgery.Cut`` with its kept indices as a list."""

    module: str
    parameter: str
    dim: Annotated[int, Field(ge=0)]
    size: int
    kept: _Indices

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        _require_below(self.kept, self.size)
        return self

    @classmethod
    def of(cls, cut: Cut) -> Self:
        return cls(
            module=cut.module,
            parameter=cut.parameter,
            dim=cut.dim,
            size=cut.kept.numel(),
            kept=_indices_of(cut.kept),
        )

    def cut(self, network: nn.Module) -> Cut:
        """Convert the record to a ``Cut`` of the dense network.

        Raises:
            ConfigError: the network has no such parameter, or one of another size.
        """
        try:
            network.get_submodule(self.module)
            fits = network.get_parameter(self.parameter).shape[self.dim] == self.size
        except (AttributeError, IndexError):
            fits = False
        if not fits:
            raise ConfigError(
                f"its cut of {self.parameter[:100]!r} does not fit the network; does build return "
                "the network that the ticket was drawn from?"
            )
        return Cut(self.module, self.parameter, self.dim, _flags_of(self.kept, self.size))


class Record(Schema):
    """The content of ``ticket.json``.

    Attributes:
        model: the dense network's builder arguments; None if it is not in ``worm_dist.models``.
        input_shape: the shape of one sample of the network's input, without the batch dimension;
            None if it has several inputs, or inputs that are not floats.
        settings: the engine's settings when the ticket was drawn, as JSON values; not validated,
            as those of other versions differ.
        mask_digest: the digest of the drawn mask.
        groups: the kept channels of the dense network's groups.
        cuts: the cuts of the dense network's parameters, at most one for each dimension.
        weights: the size and digest of ``ticket.safetensors``.
        versions: the package versions, by name.
        digest: the sha256 of all other fields.
    """

    format_version: int = _FORMAT_VERSION
    model: ModelRecord | None
    input_shape: list[Annotated[int, Field(ge=1, le=_MAX_CHANNELS)]] | None = None
    settings: dict[str, Any] | None = None
    mask_digest: str
    groups: list[GroupRecord]
    cuts: list[CutRecord]
    weights: FileDigest
    versions: dict[str, str]
    digest: str = ""

    @model_validator(mode="after")
    def _check_cuts(self) -> Self:
        counts = Counter((cut.parameter, cut.dim) for cut in self.cuts)
        twice = [name for (name, _), count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"{twice[0][:100]} is cut twice")
        return self

    def signed(self) -> Self:
        """Return a copy with the digest of its content."""
        later = _FIELDS_SINCE_5 if self.format_version == 4 else frozenset()
        content = json.dumps(self.model_dump(exclude={"digest", *later}), sort_keys=True)
        return self.model_copy(update={"digest": sha256_of([content.encode()])})


class _Format(BaseModel):
    """The field that tickets of all format versions have."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format_version: int


def read_metadata(folder: Path) -> Record:
    """Read and validate the metadata of a ticket.

    Args:
        folder: the ticket's folder.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    path = folder / METADATA
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: there is no such file; is this the folder of a ticket?")
    content = read_small(path, _MAX_BYTES)
    try:
        found = _Format.model_validate_json(content).format_version
        if found not in (4, _FORMAT_VERSION):
            raise CheckpointError(
                f"{path}: format {found}, but this version of worm_dist reads formats 4 and "
                f"{_FORMAT_VERSION}; load it with the version that wrote it"
            )
        record = Record.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: not a ticket: {first_problem(error)}") from error
    if record != record.signed():
        raise CheckpointError(
            f"{path}: sha256 differs from the recorded one; the file was damaged or changed"
        )
    for contradiction in _contradictions(record):
        raise CheckpointError(f"{path}: {contradiction}; the file was changed")
    return record


def _contradictions(record: Record) -> Iterator[str]:
    if record.format_version == 4 and record.model_fields_set & _FIELDS_SINCE_5:
        yield f"format 4 has no {min(record.model_fields_set & _FIELDS_SINCE_5)}"
    if sum(group.num_channels for group in record.groups) > _MAX_CHANNELS:
        yield f"its groups have more than {_MAX_CHANNELS} channels"
    groups = {group.name: group for group in record.groups}
    keep = {name: group.keep for name, group in groups.items()}
    if len(keep) < len(record.groups) or not keep or Mask(keep).digest != record.mask_digest:
        yield "the kept channels of its groups are not those of mask_digest"
    for cut in record.cuts:
        # A group has the name of the module that produces its channels, which has them in order.
        group = groups.get(cut.module)
        is_its = group is not None and (cut.dim, cut.size) == (0, group.num_channels)
        if group is not None and is_its and cut.kept != group.kept:
            yield f"its cut of {cut.parameter[:100]} keeps other channels than the group"


def _require_below(indices: list[int], size: int) -> None:
    if indices[-1] >= size:
        raise ValueError(f"keeps index {indices[-1]} of {size}")


def _flags_of(indices: list[int], size: int) -> Tensor:
    flags = torch.zeros(size, dtype=torch.bool)
    flags[indices] = True
    return flags


def _indices_of(flags: Tensor) -> list[int]:
    return [int(index) for index in flags.nonzero().flatten()]
