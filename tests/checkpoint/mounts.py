"""Mounts: file systems of a test's own, in a process that alone sees them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.crashes import in_a_fork

__all__ = ["on_a_small_disk"]

_NEW_NAMES = 0x00020000
"""unshare(2): mounts of one's own."""
_NEW_USERS = 0x10000000
_REMOUNT, _RECURSIVE, _PRIVATE = 32, 1 << 14, 1 << 18
_NOT_PERMITTED = 77


def on_a_small_disk(folder: Path, test: Callable[[Callable[[int], None]], None]) -> None:
    """Run a test where the folder is a file system of 1 MB; it may mount it anew with flags."""
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(kind: str, flags: int, options: str = "") -> None:
        target = "/" if kind == "none" else str(folder)
        words = [word.encode() for word in (kind, target, kind, options)]
        if libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
            os._exit(_NOT_PERMITTED)

    def inside() -> None:
        if libc.unshare(_NEW_NAMES | (0 if os.geteuid() == 0 else _NEW_USERS)):
            os._exit(_NOT_PERMITTED)
        mount("none", _RECURSIVE | _PRIVATE)
        mount("tmpfs", 0, "size=1m")
        test(lambda flags: mount("tmpfs", flags | _REMOUNT, "size=1m"))

    exitcode = in_a_fork(inside)
    if exitcode == _NOT_PERMITTED:
        pytest.skip("mounts are not permitted here")
    assert exitcode == 0
