"""Fingerprint of the installed software, compared across the ranks at the start."""

from __future__ import annotations

import hashlib
from pathlib import Path

import worm_dist

from .reporting.result import versions

__all__ = ["installation"]


def installation() -> dict[str, str]:
    """Versions of the numerical packages, and a digest of worm_dist's source code.

    The digest is needed because an editable installation keeps its version across a pull.  Patch
    releases of Python may differ.
    """
    found = {f"the version of {name}": number for name, number in versions().items()}
    del found["the version of python"]
    return {**found, "the code of worm_dist": _digest(Path(worm_dist.__file__).parent)}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
