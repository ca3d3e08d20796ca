"""Loader processes in a container with too little shared memory."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.faults.driver import Act, Driver, Fault, Run, small_data
from worm_dist.training.data import Data

pytestmark = pytest.mark.skipif("not _can_mount()", reason="needs root, to mount a small /dev/shm")

START = "worm_dist.training.trainer:Trainer.__init__"
_NEW_NAMESPACE, _PRIVATE, _ALL_BELOW = 0x20000, 0x40000, 0x4000


def _is_mounted(options: bytes) -> bool:
    """Mount a small /dev/shm that only this process, and those that it starts, can see."""
    libc = ctypes.CDLL(None)
    return bool(
        libc.unshare(_NEW_NAMESPACE) == 0
        and libc.mount(b"none", b"/", None, _PRIVATE | _ALL_BELOW, None) == 0
        and libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, options) == 0
    )


def _with_little(options: bytes, real: Act, *args: Any, **kwargs: Any) -> Any:
    assert _is_mounted(options)
    return real(*args, **kwargs)


def _can_mount() -> bool:
    """Tried in a process of its own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = "unshare --mount mount -t tmpfs -o size=64k tmpfs /dev/shm"
    return subprocess.run(command.split(), capture_output=True).returncode == 0


def _large_images(rank: int) -> Data:
    """A batch has 128 KiB."""
    data, images = small_data(rank), torch.randn(144, 1, 64, 64)
    classes = torch.arange(144) % 10
    return Data(
        train=TensorDataset(images[:128], classes[:128]),
        test=TensorDataset(images[128:], classes[128:]),
        num_classes=data.num_classes,
        sample_shape=(1, 64, 64),
        description="noise",
    )


@pytest.mark.fault(43, "no place for semaphores, or for batches")
@pytest.mark.parametrize("options", [b"size=4k", b"size=72k"], ids=["semaphores", "batches"])
def test_too_little_shared_memory_is_named_with_the_remedy(driver: Driver, options: bytes) -> None:
    """It was an OSError of a semaphore with the number 28, or a traceback of a loader process."""
    fault = Fault.do(functools.partial(_with_little, options), rank=0, step=1).at(START)
    ends = driver(2, Run((fault,), {"data.num_workers": 1}, data=_large_images))
    assert [end.exitcode for end in ends] == [2, 2], ends
    for end in ends:
        (line,) = end.errors
        assert "data.num_workers: /dev/shm, 0.0" in line and "--ipc=host" in line
    assert ends[0].said.count("\n") == 1, ends[0].said


@pytest.mark.fault(43, "without other ranks")
def test_one_process_alone_says_it_in_one_line(driver: Driver) -> None:
    """The destructor of torch's iterator added a traceback."""
    fault = Fault.do(functools.partial(_with_little, b"size=4k"), rank=0, step=1).at(START)
    (end,) = driver(1, Run((fault,), {"data.num_workers": 2}))
    assert end.exitcode == 2
    assert end.said.count("\n") == 1 and "set data.num_workers to 0" in end.said
