"""Installation: what a rank runs, to be compared with what the others run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import worm_dist

from .reporting.result import versions

__all__ = ["installation"]


def installation() -> dict[str, str]:
    """Versions of what computes, and a digest of our own code: an editable installation has the
    same version before and after a pull.  Python's own patches make no difference."""
    said = {f"the version of {name}": number for name, number in versions().items()}
    del said["the version of python"]
    return {**said, "the code of worm_dist": _digest(Path(worm_dist.__file__).parent)}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
