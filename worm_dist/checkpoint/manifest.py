"""Manifest: what a checkpoint is, and what each of its files must be.

It is written last and read first.  A folder without it is no checkpoint.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError
from .durable_io import FileDigest, Part, read_small, write_file

__all__ = ["CheckpointInfo", "Manifest", "complaint", "read_manifest", "write_manifest"]

_Model = TypeVar("_Model", bound=BaseModel)

_NAME = "manifest.json"
_FORMAT_VERSION = 1
_LARGEST = 4 << 20
"""Bytes; about ten thousand ranks with files of their own."""

# Names in one folder: neither separators nor anything that begins with a dot.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}\.(json|safetensors)\z")]


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class CheckpointInfo(Part):
    """What is known of a checkpoint without its tensors.

    Attributes:
        step: optimizer steps taken.
        world_size: of the run that wrote it.
        phase: of that run.
        config_digest: of its settings.
        value: how good the model is, higher is better; of the checkpoints the best is kept.  None
            if it was not measured, and so are NaN and the infinities.
    """

    step: Annotated[int, Field(ge=0, lt=10**18)]
    world_size: Annotated[int, Field(ge=1)]
    phase: str
    config_digest: str
    value: Annotated[float | None, AfterValidator(_finite_or_none)] = None


class Manifest(CheckpointInfo):
    """The content of ``manifest.json``.

    Attributes:
        format_version: of the files.
        versions: of Python and packages, by name.
        files: what each file must be, by its name in the folder.
    """

    format_version: int
    versions: dict[str, str]
    files: dict[_FileName, FileDigest]


class _Format(BaseModel):
    """What a manifest of any version has."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format_version: int


def write_manifest(folder: Path, about: CheckpointInfo, files: Mapping[str, FileDigest]) -> None:
    """Write ``manifest.json`` into the folder, durably.

    Raises:
        CheckpointError: it cannot be written.
    """
    manifest = Manifest(
        **about.model_dump(),
        format_version=_FORMAT_VERSION,
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "worm_dist")},
        },
        files=dict(files),
    )
    write_file(folder / _NAME, [manifest.model_dump_json(indent=2).encode() + b"\n"])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        CheckpointError: it is missing, damaged, or of a format that this version does not read.
    """
    path = folder / _NAME
    content = read_small(path, _LARGEST)
    found = _validated(_Format, path, content).format_version
    if found != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: wanted format {_FORMAT_VERSION}, found format {found}; another version of "
            "worm_dist wrote it"
        )
    return _validated(Manifest, path, content)


def _validated(model: type[_Model], path: Path, content: bytes) -> _Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: not the manifest of a checkpoint: {complaint(error)}"
        ) from error


def complaint(error: ValidationError) -> str:
    """The first thing that is wrong, in a line that what was read cannot make long."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(name) for name in first["loc"])
    return f"{place[:100]}: {first['msg'][:200]}" if place else first["msg"][:200]
