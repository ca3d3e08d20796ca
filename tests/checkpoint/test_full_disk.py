"""A disk that is full, or cannot be written: nothing is left behind, and what was there stays."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.crashes import in_a_fork
from tests.checkpoint.mounts import on_a_small_disk
from tests.checkpoint.states import difference, info, save, small_state
from worm_dist import CheckpointError
from worm_dist.checkpoint.durable_io import write_json
from worm_dist.checkpoint.manager import CheckpointManager

_READ_ONLY = 1
"""mount(2)."""


def _refused(manager: CheckpointManager, text: str) -> None:
    """Save what does not fit; whoever runs this sees how it ends."""
    large = {"run": {"weights": torch.zeros(500_000)}}
    with pytest.raises(CheckpointError, match=text):
        manager.save(info(2), large)


def _is_as_before(folder: Path) -> None:
    assert os.listdir(folder) == ["step-1"]
    newest = CheckpointManager(folder).newest()
    assert newest is not None
    assert not difference(newest.read("run"), small_state(1))


@pytest.mark.fault(9, "a limit on the size of files")
def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    save(CheckpointManager(tmp_path), 1)

    def limited() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        _refused(
            CheckpointManager(tmp_path),
            r"step-2\.tmp-\w+/run\.safetensors: disk full \(File too large\)",
        )

    assert in_a_fork(limited) == 0
    _is_as_before(tmp_path)


@pytest.mark.fault(9, "a disk that is full")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    def full(remount: Callable[[int], None]) -> None:
        manager = CheckpointManager(tmp_path)
        save(manager, 1)
        _refused(manager, r"run\.safetensors: disk full \(No space left on device\)")
        _is_as_before(tmp_path)
        manager.save(info(3), {"run": {"weights": torch.zeros(50_000)}})

    on_a_small_disk(tmp_path, full)


@pytest.mark.fault(9, "several ranks on a disk that is full")
def test_several_ranks_on_a_disk_that_is_full(tmp_path: Path) -> None:
    def full(remount: Callable[[int], None]) -> None:
        manager = CheckpointManager(tmp_path)
        save(manager, 1)
        staged = manager.stage(2)
        staged.write("rank-0", {"weights": torch.zeros(50_000)})
        with pytest.raises(CheckpointError, match=r"rank-1\.safetensors: disk full"):
            staged.write("rank-1", {"weights": torch.zeros(500_000)})
        assert sorted(os.listdir(staged.path)) == ["rank-0.json", "rank-0.safetensors"]
        staged.abandon()
        _is_as_before(tmp_path)

    on_a_small_disk(tmp_path, full)


@pytest.mark.fault(9, "a disk that can only be read")
def test_a_disk_that_can_only_be_read(tmp_path: Path) -> None:
    def read_only(remount: Callable[[int], None]) -> None:
        manager = CheckpointManager(tmp_path)
        save(manager, 1)
        remount(_READ_ONLY)
        with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
            save(manager, 2)
        with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
            manager.rewind(0)
        manager.sweep()
        _is_as_before(tmp_path)

    on_a_small_disk(tmp_path, read_only)


def test_the_disk_is_full_when_it_is_told_to_keep_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems find room for it only then."""
    save(CheckpointManager(tmp_path), 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        _refused(CheckpointManager(tmp_path), "disk full")
    _is_as_before(tmp_path)


@pytest.mark.fault(48, "a limit on the size of files, in an atomic write")
def test_nothing_stays_of_a_json_file_that_does_not_fit(tmp_path: Path) -> None:
    """An empty ``.result.json.PID`` stayed."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(OSError, match="File too large"):
            write_json(tmp_path / "result.json", {"text": "x" * 200})

    write_json(tmp_path / "result.json", {})
    assert in_a_fork(limited) == 0
    assert os.listdir(tmp_path) == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "{}\n"
