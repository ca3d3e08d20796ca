"""Crashes: a process that is killed, or loses its power, at a given call to the file system.

To be killed is real: a fork of this process, which takes milliseconds, sends itself the signal.  A
power cut is not: from the given call on no call reaches the disk, and what the disk would not have
kept is taken from it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

__all__ = ["Ending", "ends_at", "fork", "in_a_fork"]

_CALLS = ("open", "write", "fsync", "mkdir", "rmdir", "replace", "rename", "unlink")


class Ending(Enum):
    """What becomes of a process, and of what it has written.

    ``KILLED``: what it has handed to the kernel is there.
    ``POWER_CUT``: of the files that were not synced only the names are there; all renames are.
    ``POWER_CUT_NAMES``: neither are names in folders that were not synced, nor what they name.
    """

    KILLED = "killed"
    POWER_CUT = "power cut, names are there"
    POWER_CUT_NAMES = "power cut"


def fork() -> int:
    """0 in the new process, which must leave by ``os._exit``; else its number."""
    with warnings.catch_warnings():
        # Newer Pythons warn of threads; those of torch and of the tests are idle here.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_a_fork(function: Callable[[], object]) -> int:
    """How a fork of this process that calls the function ended: 0, or minus a signal."""
    child = fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ends_at(point: int, ending: Ending, function: Callable[[], object]) -> bool:
    """Whether the function came to its end before the given call.

    Power is cut after the last call as well.
    """
    if ending is Ending.KILLED:
        exitcode = in_a_fork(lambda: _Disk(point, ending).run(function))
        assert exitcode in (0, -signal.SIGKILL), exitcode
        return exitcode == 0
    try:
        _Disk(point, ending).run(function)
    except _PowerCut:
        return False
    return True


class _PowerCut(BaseException):
    """No handler can do anything about it."""


class _Disk:
    """Counts calls, and knows what a disk would have lost."""

    def __init__(self, point: int, ending: Ending) -> None:
        self._left = point
        self._ending = ending
        self._is_dead = False
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in _CALLS}
        self._paths: dict[int, Path] = {}
        self._data: set[Path] = set()
        self._names: set[Path] = set()

    def run(self, function: Callable[[], object]) -> None:
        self._install(self._counted)
        try:
            function()
        finally:
            self._install(self._real.__getitem__)
        self._cut()

    @staticmethod
    def _install(call: Callable[[str], Callable[..., Any]]) -> None:
        for name in _CALLS:
            setattr(os, name, call(name))

    def _counted(self, name: str) -> Callable[..., Any]:
        note = getattr(self, f"_note_{name}", lambda result, *arguments: None)

        def call(*arguments: Any, **keywords: Any) -> Any:
            if self._left == 0 and not self._is_dead:
                self._end(name, arguments)
            if self._is_dead:
                raise _PowerCut
            self._left -= 1
            # Nothing here survives a real power cut: there is no need to wait for the disk.
            result = None if name == "fsync" else self._real[name](*arguments, **keywords)
            if keywords.get("dir_fd") is None:
                note(result, *arguments)
            return result

        return call

    def _end(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write":  # half of it
            descriptor, data = arguments
            self._real["write"](descriptor, data[: len(data) // 2])
            self._data.add(self._paths[descriptor])
        self._is_dead = True
        if self._ending is Ending.KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        self._install(self._real.__getitem__)
        self._cut()
        self._install(self._counted)

    def _note_open(self, descriptor: int, path: Any, flags: int, mode: int = 0o777) -> None:
        self._paths[descriptor] = Path(path)
        if flags & os.O_CREAT:
            self._data.add(Path(path))
            self._names.add(Path(path))

    def _note_write(self, count: int, descriptor: int, data: Any) -> None:
        self._data.add(self._paths[descriptor])

    def _note_fsync(self, result: None, descriptor: int) -> None:
        path = self._paths[descriptor]
        self._data.discard(path)
        self._names -= {name for name in self._names if name.parent == path}

    def _note_mkdir(self, result: None, path: Any, mode: int = 0o777) -> None:
        self._names.add(Path(path))

    def _note_replace(self, result: None, source: Any, target: Any) -> None:
        def moved(paths: set[Path]) -> set[Path]:
            return {
                Path(target, *path.relative_to(source).parts)
                if path.is_relative_to(source)
                else path
                for path in paths
            }

        self._data, self._names = moved(self._data), moved(self._names)

    def _cut(self) -> None:
        """Take from the disk what it would have lost."""
        if self._ending is Ending.KILLED:
            return
        for path in self._data:
            if path.exists():
                os.truncate(path, 0)
        if self._ending is Ending.POWER_CUT_NAMES:
            for path in self._names:
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.exists():
                    path.unlink()
