"""A lock that is renewed: who may take it over, and when, and what becomes of who has lost it."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import UnixFileLock

from tests.checkpoint.crashes import fork
from tests.checkpoint.locks import pid_in, refused
from worm_dist import ConfigError
from worm_dist.checkpoint import lease, lock
from worm_dist.checkpoint.lease import Holder, Lease
from worm_dist.checkpoint.lock import run_lock

pytestmark = pytest.mark.slow("watches leases run out, six seconds")

RENEWAL, JOB, LEASE = 0.02, 0.2, 0.5
"""Seconds of a renewal, and without one until the job's next start or anybody takes over."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that run out soon."""
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", RENEWAL)
    monkeypatch.setattr(lock, "_JOB_SECONDS", JOB)
    monkeypatch.setattr(lease, "LEASE_SECONDS", LEASE)
    monkeypatch.setattr(lock, "_POLL_SECONDS", RENEWAL)


@pytest.fixture
def no_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between hosts on most network file systems, and on some mounts of Lustre at all."""

    def missing(lock: UnixFileLock) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(UnixFileLock, "acquire", missing)


def _left_behind(folder: Path, **job: str) -> Holder:
    """The lock of a run that was killed on a host with this one's name."""
    holder = Holder.this_process("another boot:1:1", job)
    (folder / "run.lock").write_bytes(holder.after(7))
    return holder


def _require_for(seconds: float, held: Lease) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        held.require()


# ---- other hosts and containers ------------------------------------------------------------------


@contextmanager
def _alive(folder: Path) -> Iterator[int]:
    """The process of a run that holds the lock and does nothing else."""
    ready = os.pipe()
    child = fork()
    if child == 0:
        with run_lock(folder):
            os.write(ready[1], b"x")
            signal.pause()
    os.read(ready[0], 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in ready:
            os.close(end)


@pytest.mark.fault(32, "refused while the first renews, taken over when it is killed")
@pytest.mark.usefixtures("short", "no_kernel_locks")
def test_a_namesake_in_another_container_is_refused_while_it_renews(tmp_path: Path) -> None:
    """The host name was that of this host, and its process id was looked for here."""
    with _alive(tmp_path) as child:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lease, "LEASE_SECONDS", 20.0)  # a busy machine may renew late
            for _ in range(2):
                refused(tmp_path, f"process {child} on .*; it is at work")
        os.kill(child, signal.SIGKILL)
        with run_lock(tmp_path):
            assert pid_in(tmp_path) == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(34, "by anybody, when the lease has run out")
@pytest.mark.parametrize("content", [None, b"", b"process", b'{"host": "a", "pid": 1}', b"\xff"])
@pytest.mark.usefixtures("short")
def test_a_lease_that_is_not_renewed_runs_out(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """That of another host was refused for ever, and so was one that names nobody."""
    _left_behind(tmp_path)
    if content is not None:
        (tmp_path / "run.lock").write_bytes(content)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), run_lock(tmp_path):
        assert time.monotonic() - began >= LEASE
    assert not list(tmp_path.iterdir())
    assert "waiting up to 0.5 seconds to see whether that run is alive" in caplog.text


@pytest.mark.fault(34, "at once, by a job that SLURM has requeued")
def test_a_requeued_job_takes_its_own_over_at_once(tmp_path: Path) -> None:
    _left_behind(tmp_path, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1")
    began = time.monotonic()
    with run_lock(tmp_path, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}):
        assert time.monotonic() - began < lock._JOB_SECONDS / 2


@pytest.mark.fault(34, "soon, by another start of the same job")
@pytest.mark.parametrize(
    ("before", "now", "seconds"),
    [
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "a"}, JOB),
        ({"TORCHELASTIC_RUN_ID": "a"}, {"TORCHELASTIC_RUN_ID": "b"}, LEASE),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, LEASE),
        ({"SLURM_JOB_ID": "12"}, {"SLURM_JOB_ID": "12"}, JOB),
        ({"SLURM_JOB_ID": "12"}, {"SLURM_JOB_ID": "13", "SLURM_RESTART_COUNT": "1"}, LEASE),
    ],
)
@pytest.mark.usefixtures("short")
def test_the_same_job_waits_for_a_few_renewals(
    tmp_path: Path, before: dict[str, str], now: dict[str, str], seconds: float
) -> None:
    """Two live runs may have one id, such as 100 from a tutorial, so the id alone is no proof."""
    _left_behind(tmp_path, **before)
    began = time.monotonic()
    with run_lock(tmp_path, now):
        waited = time.monotonic() - began
    assert waited >= seconds and (seconds == LEASE or waited < LEASE)


@pytest.mark.fault(32, "a live run of the same job")
@pytest.mark.usefixtures("short", "no_kernel_locks")
def test_a_live_run_of_the_same_job_is_not_taken_over(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "100")
        patch.setattr(lock, "_JOB_SECONDS", 20.0)
        with _alive(tmp_path):
            refused(tmp_path, "it is at work")


@pytest.mark.fault(34, "the server keeps the kernel's lock of a host that died")
@pytest.mark.usefixtures("short")
def test_a_lock_that_a_server_keeps_for_a_dead_host_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does; only the lease tells it from one that is alive."""
    monkeypatch.setattr(lock, "_SECONDS", 0.1)
    _left_behind(tmp_path)
    with UnixFileLock(tmp_path / ".run.flock"), run_lock(tmp_path):
        assert pid_in(tmp_path) == os.getpid()


# ---- a lock that is lost -------------------------------------------------------------------------


@pytest.mark.fault(32, "a run that has lost its lock writes no more")
@pytest.mark.usefixtures("short")
def test_a_run_that_was_taken_over_finds_out_and_leaves_the_lock(tmp_path: Path) -> None:
    with run_lock(tmp_path) as held:
        held.require()
        (tmp_path / "run.lock").unlink()
        held.require()  # nobody else claims the directory
        other = _left_behind(tmp_path)
        with pytest.raises(ConfigError, match="another run has taken this directory over: proc"):
            _require_for(10, held)
    assert (tmp_path / "run.lock").read_bytes() == other.after(7), "no renewal is in it"


def test_after_a_suspension_it_looks_before_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training thread may run before the one that renews."""
    with run_lock(tmp_path) as held:
        monkeypatch.setattr(lease, "LEASE_SECONDS", 0.0)
        _left_behind(tmp_path)
        (tmp_path / "run.lock").rename(tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "run.lock")
        with pytest.raises(ConfigError, match="taken this directory over"):
            held.require()


@pytest.mark.usefixtures("short")
def test_a_lock_that_was_put_in_its_place_meanwhile_is_put_back(tmp_path: Path) -> None:
    """A look at the lock and then a renaming are two calls; another run may come in between."""
    old, path = _left_behind(tmp_path), tmp_path / "run.lock"
    _left_behind(tmp_path)
    found = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        looks = iter([old.after(7)])
        real = lease.content_of
        patch.setattr(lock, "content_of", lambda path: next(looks, None) or real(path))
        lock._take_away(path, old.after(7), "mine")
    assert path.read_bytes() == found
    assert os.listdir(tmp_path) == ["run.lock"]
