"""Stacks: where every thread of a rank is when ranks are missed, kept in the run's folder.

The ranks send them to rank zero, because hosts need not share a disk; see ``monitor``.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch

__all__ = ["STACKS", "flight_record", "own_stacks", "write_stacks"]

STACKS = "stacks"
"""Name of the folder of stacks in a run's folder."""

_MAX_CHARACTERS = 100_000
"""Longest text, so that it fits into a message even if JSON has to escape every character."""
_MAX_FRAMES = 100
_RECORDER_SIZES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
"""Functions of torch; the second one is for other backends than nccl, and came after torch 2.6."""


def own_stacks(what: str, first: int) -> str:
    """The stacks of all threads of this process.

    Like those of ``faulthandler``, but with names of threads, and without a file.  Lines of source
    are left out: to read them from a disk that does not answer is what other threads may hang in.

    Args:
        what: description of what this rank does, for the first line.
        first: identifier of the thread to begin with.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames()
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    lines = [f"{what}; host {socket.gethostname()}, process {os.getpid()}, {now}"]
    for thread in sorted(frames, key=lambda thread: (thread != first, thread)):
        lines += ["", f"Thread {names.get(thread, thread)} (most recent call first):"]
        frame: FrameType | None = frames[thread]
        for _ in range(_MAX_FRAMES):
            if frame is None:
                break
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            frame = frame.f_back
    return "\n".join(lines)[:_MAX_CHARACTERS] + "\n"


def flight_record() -> str:
    """The collectives that have not ended, by torch's flight recorder, in JSON; mostly "".

    Only if the user has turned the recorder on: to read it asks the GPU, which may not answer.
    """
    if not any(os.environ.get(name, "0") not in ("", "0") for name in _RECORDER_SIZES):
        return ""
    for name in _RECORDERS:
        with suppress(AttributeError, RuntimeError):  # of another version
            record = getattr(torch._C._distributed_c10d, name)(True, True).decode(errors="replace")
            if '"entries"' in record:
                return f"\nFlight recorder:\n{record[-_MAX_CHARACTERS:]}\n"  # the newest
    return ""


def write_stacks(
    folder: Path, texts: Mapping[int, str], seconds: float, removes_others: bool
) -> bool:
    """Write the texts of ranks to ``rank-N.txt`` in a folder; return whether that was possible.

    Args:
        folder: folder that is created if need be, in one that is there.
        texts: a text for each rank.
        seconds: limit on the time to write; a disk that does not answer is left to a thread.
        removes_others: whether files of other ranks are removed, which are of an earlier failure.
    """
    written: list[int] = []

    def write() -> None:
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            for old in folder.glob("rank-*.txt") if removes_others else ():
                old.unlink()
            for rank, text in texts.items():
                (folder / f"rank-{rank}.txt").write_text(text, "utf-8", errors="backslashreplace")
                written.append(rank)

    thread = threading.Thread(target=write, name="worm_dist stacks", daemon=True)
    thread.start()
    thread.join(seconds)
    return len(written) == len(texts) > 0
