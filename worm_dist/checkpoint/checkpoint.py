"""Checkpoint: one that is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .durable_io import check_size, file_size, open_sealed
from .manifest import Manifest, read_manifest
from .staging import STEP
from .state_file import read_part

__all__ = ["Checkpoint"]


class Checkpoint:
    """A checkpoint whose manifest is right and whose files have the right sizes.

    Args:
        path: of its folder.

    Attributes:
        manifest: what it says of itself.

    Raises:
        CheckpointError: the manifest is missing or damaged, it is of another step than the
            folder, or a file is missing or of another size.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        named = STEP.fullmatch(self.path.name)
        if named and int(named[1]) != self.step:
            raise CheckpointError(
                f"{self.path}: wanted step {int(named[1])}, found step {self.step} in its "
                "manifest; was the folder renamed?"
            )
        for name, seal in self.manifest.files.items():
            check_size(self.path / name, file_size(self.path / name), seal)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def parts(self) -> list[str]:
        """Names of the states in it."""
        return sorted({Path(name).stem for name in self.manifest.files})

    def verify(self) -> None:
        """Compare every byte of every file with the manifest.

        Raises:
            CheckpointError: a file is not what was written.
        """
        for name, seal in self.manifest.files.items():
            with open_sealed(self.path / name, seal):
                pass

    def read(self, part: str) -> Any:
        """The state of a part, as it was written, its tensors on the CPU.

        The part's two files are compared before they are parsed, and no others: a rank need not
        read what belongs to the others.

        Raises:
            CheckpointError: there is no such part, or a file is not what was written.
        """
        if part not in self.parts:
            raise CheckpointError(f"{self.path}: wanted part {part!r}, found {self.parts}")
        return read_part(self.path, part, self.manifest.files)
