"""Record: ``ticket.json``, which says what was cut of which network."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ..checkpoint.durable_io import FileDigest, Part, read_small
from ..checkpoint.manifest import complaint
from ..errors import CheckpointError, ConfigError
from ..groups.channel_groups import ChannelGroup
from ..pruning.surgery import Cut

__all__ = ["CutRecord", "GroupRecord", "ModelRecord", "Record"]

_FORMAT_VERSION = 3
_LARGEST = 64 << 20
"""Bytes; a hundred times what the largest networks of torchvision need."""


def _ascending(places: list[int]) -> list[int]:
    if not all(one < other for one, other in zip([-1, *places], places, strict=False)):
        raise ValueError("must be different places, in order")
    return places


_Places = Annotated[list[int], Field(min_length=1), AfterValidator(_ascending)]


class ModelRecord(Part):
    """Arguments of ``worm_dist.models.build_model``: a name that it knows, and plain values."""

    name: str
    num_classes: int
    in_channels: int
    arguments: dict[str, Any] = Field(default_factory=dict)


class GroupRecord(Part):
    """What the mask kept of a group: for people, loading goes by the cuts."""

    name: str
    num_channels: int
    kept: _Places

    @classmethod
    def of(cls, group: ChannelGroup, keep: Tensor) -> Self:
        return cls(name=group.name, num_channels=group.num_channels, kept=_places(keep))


class CutRecord(Part):
    """A ``surgery.Cut`` with its places by number."""

    module: str
    parameter: str
    dim: Annotated[int, Field(ge=0)]
    size: int
    kept: _Places

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        if self.kept[-1] >= self.size:
            raise ValueError(f"keeps place {self.kept[-1]} of {self.size}")
        return self

    @classmethod
    def of(cls, cut: Cut) -> Self:
        return cls(
            module=cut.module,
            parameter=cut.parameter,
            dim=cut.dim,
            size=cut.kept.numel(),
            kept=_places(cut.kept),
        )

    def cut(self, network: nn.Module) -> Cut:
        """Of the dense network.

        Raises:
            ConfigError: it does not have this parameter, or of another size.
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
        kept = torch.zeros(self.size, dtype=torch.bool)
        kept[self.kept] = True
        return Cut(self.module, self.parameter, self.dim, kept)


class Record(Part):
    """What ``ticket.json`` holds.

    Attributes:
        model: None if only the owner of the network can build it.
        mask_digest: of the mask that was drawn.
        groups: of the dense network.
        cuts: of its parameters; no dimension of any is cut twice.
        weights: what ``ticket.safetensors`` must be.
        versions: of packages, by name.
        digest: sha256 of all the rest; another digit in it would be another network.
    """

    format_version: int = _FORMAT_VERSION
    model: ModelRecord | None
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
        """The same, with its digest."""
        content = json.dumps(self.model_dump(exclude={"digest"}), sort_keys=True)
        return self.model_copy(update={"digest": hashlib.sha256(content.encode()).hexdigest()})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises a CheckpointError if the file is missing, damaged, or of another format."""
        content = read_small(path, _LARGEST)
        try:
            found = _Format.model_validate_json(content).format_version
            if found != _FORMAT_VERSION:
                raise CheckpointError(
                    f"{path}: format {found}, but this version of worm_dist reads format "
                    f"{_FORMAT_VERSION}"
                )
            record = cls.model_validate_json(content)
        except ValidationError as error:
            raise CheckpointError(f"{path}: not a ticket: {complaint(error)}") from error
        if record != record.signed():
            raise CheckpointError(
                f"{path}: its sha256 is not the one that it says; the file was damaged or changed"
            )
        return record


class _Format(BaseModel):
    """What a ticket of any version has."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format_version: int


def _places(flags: Tensor) -> list[int]:
    return [int(place) for place in flags.nonzero().flatten()]
