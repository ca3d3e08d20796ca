"""The manifest of a checkpoint: its description, and size and hash of each of its files.

It is written last and read first.  A folder without it is not a checkpoint.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..digest import sha256_of
from ..errors import CheckpointError
from ..schema import Schema, first_problem
from .durable_io import FileDigest, read_small, write_file
from .sharded_tensor import is_shard

__all__ = ["CheckpointInfo", "Manifest", "manifest_digest", "read_manifest", "write_manifest"]

_Model = TypeVar("_Model", bound=BaseModel)

_NAME = "manifest.json"
_FORMAT_VERSION = 2
_FORMAT_WITH_SHARDS = 3
"""In which tensors may be in the files of several ranks; see ``sharded_tensor``."""
_MAX_BYTES = 4 << 20
"""Largest manifest that is read; enough for the files of about ten thousand ranks."""

# Names within the folder: no separators, no leading dot.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}\.(json|safetensors)\z")]


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class CheckpointInfo(Schema):
    """Description of a checkpoint.

    Attributes:
        step: number of optimizer steps taken.
        world_size: number of ranks of the run that wrote it.
        phase: phase of the run.
        value: quality of the model, higher is better; the checkpoint with the highest value is
            kept.  None if it was not measured; NaN and infinities are stored as None.
    """

    step: Annotated[int, Field(ge=0, lt=10**18)]
    world_size: Annotated[int, Field(ge=1)]
    phase: str
    value: Annotated[float | None, AfterValidator(_finite_or_none)] = None


class Manifest(CheckpointInfo):
    """The content of ``manifest.json``.

    Attributes:
        format_version: version of the file formats.
        versions: versions of Python and packages, by name.
        files: size and hash of each file, by its name in the folder.
    """

    format_version: int
    versions: dict[str, str]
    files: dict[_FileName, FileDigest]


class _Format(BaseModel):
    """The part of a manifest that is common to all format versions."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format_version: int


def write_manifest(folder: Path, info: CheckpointInfo, files: Mapping[str, FileDigest]) -> None:
    """Write ``manifest.json`` into a folder and sync it to disk.

    Args:
        folder: the checkpoint's folder.
        info: description of the checkpoint.
        files: size and hash of each file, by its name in the folder.

    Raises:
        CheckpointError: the file cannot be written.
    """
    manifest = Manifest(
        **info.model_dump(),
        format_version=_FORMAT_WITH_SHARDS if any(map(is_shard, files)) else _FORMAT_VERSION,
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "worm_dist")},
        },
        files=dict(files),
    )
    write_file(folder / _NAME, [manifest.model_dump_json(indent=2).encode() + b"\n"])


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of a checkpoint's folder.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of a format that this version of the
            library does not read.
    """
    path = folder / _NAME
    content = read_small(path, _MAX_BYTES)
    found = _validated(_Format, path, content).format_version
    if found not in (_FORMAT_VERSION, _FORMAT_WITH_SHARDS):
        raise CheckpointError(
            f"{path}: wanted format {_FORMAT_VERSION} or {_FORMAT_WITH_SHARDS}, found format "
            f"{found}; another version of worm_dist wrote it"
        )
    return _validated(Manifest, path, content)


def manifest_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's manifest, by which two ranks see whether they see the same files.

    Raises:
        CheckpointError: the manifest is missing or cannot be read.
    """
    return sha256_of([read_small(folder / _NAME, _MAX_BYTES)])


def _validated(model: type[_Model], path: Path, content: bytes) -> _Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: not the manifest of a checkpoint: {first_problem(error)}"
        ) from error
