"""A checkpoint on disk, for reading."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .durable_io import check_size, file_size, open_verified
from .manifest import Manifest, read_manifest
from .sharded_tensor import is_shard
from .staging import STEP
from .state_file import read_part

__all__ = ["Checkpoint"]


class Checkpoint:
    """A checkpoint with a valid manifest, whose files have the sizes that the manifest states.

    Args:
        path: the checkpoint's folder.

    Attributes:
        path: the checkpoint's folder.
        manifest: the content of its manifest.

    Raises:
        CheckpointError: the manifest is missing or damaged, its step is not that of the folder's
            name, or a file is missing or of another size.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        match = STEP.fullmatch(self.path.name)
        if match and int(match[1]) != self.step:
            raise CheckpointError(
                f"{self.path}: wanted step {int(match[1])}, found step {self.step} in its "
                "manifest; was the folder renamed?"
            )
        for name, digest in self.manifest.files.items():
            check_size(self.path / name, file_size(self.path / name), digest)

    @property
    def step(self) -> int:
        """Number of optimizer steps taken when the checkpoint was written."""
        return self.manifest.step

    @property
    def parts(self) -> list[str]:
        """Sorted names of the states in the checkpoint."""
        return sorted({Path(name).stem for name in self.manifest.files if not is_shard(name)})

    @property
    def shards(self) -> list[str]:
        """Sorted names of the files of sharded tensors."""
        return sorted(filter(is_shard, self.manifest.files))

    def verify(self, names: Collection[str] | None = None) -> None:
        """Verify the sha256 digest of files.

        Args:
            names: names of the files; None for all.

        Raises:
            CheckpointError: a file is missing, damaged or replaced.
        """
        for name, digest in self.manifest.files.items():
            if names is None or name in names:
                with open_verified(self.path / name, digest):
                    pass

    def read(self, part: str) -> Any:
        """Read the state of a part; its tensors are on the CPU.

        Only the part's own two files are read, each verified before it is parsed, so that a rank
        need not read the states of the others.  Of sharded tensors ranges are read when they are
        needed; see ``StoredTensor``.

        Args:
            part: name of the part, one of ``parts``.

        Returns:
            The state as it was passed to ``Staged.write``.

        Raises:
            CheckpointError: there is no such part, or a file is missing, damaged or replaced.
        """
        if part not in self.parts:
            raise CheckpointError(f"{self.path}: wanted part {part!r}, found {self.parts}")
        return read_part(self.path, part, self.manifest.files)
