"""One run writes to one directory."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import UnixFileLock

from tests.checkpoint.crashes import fork, in_a_fork
from worm_dist import ConfigError
from worm_dist.checkpoint.lock import run_lock

RACERS = 6


def _left_behind(folder: Path, host: str) -> None:
    (folder / "run.lock").write_text(f"process 7 on {host}")


def test_the_lock_says_who_holds_it_and_is_gone_afterwards(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock").read_text() == _own_name()
    assert not list(tmp_path.iterdir())


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def test_it_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(23, "the second is refused")
def test_a_second_run_is_refused_and_leaves_it(tmp_path: Path) -> None:
    text = rf"{re.escape(str(tmp_path))}/run\.lock: .* {_own_name()}"

    def second() -> None:
        with pytest.raises(ConfigError, match=text), run_lock(tmp_path):
            pass

    with run_lock(tmp_path):
        second()  # of the same process
        assert in_a_fork(second) == 0
        assert (tmp_path / "run.lock").exists()


@pytest.mark.fault(23, "that of a killed run is taken over")
def test_that_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    def killed() -> None:
        with run_lock(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(killed) == -signal.SIGKILL
    assert (tmp_path / "run.lock").exists()
    with run_lock(tmp_path):
        assert (tmp_path / "run.lock").read_text() == _own_name()
    assert not list(tmp_path.iterdir())


def test_that_of_a_killed_run_is_taken_over_from_its_workers(tmp_path: Path) -> None:
    """Processes that load data are forked while the lock is held, and outlive their parent."""
    ready, over = os.pipe(), os.pipe()

    def killed() -> None:
        with run_lock(tmp_path):
            if fork() == 0:
                os.write(ready[1], b"x")
                os.read(over[0], 1)
                os._exit(0)
            os.read(ready[0], 1)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(killed) == -signal.SIGKILL
    with run_lock(tmp_path):
        pass
    os.write(over[1], b"x")
    for end in (*ready, *over):
        os.close(end)


def test_a_process_on_another_host_may_be_alive(tmp_path: Path) -> None:
    _left_behind(tmp_path, "elsewhere")
    with pytest.raises(ConfigError, match=r"on elsewhere; .* remove the file"), run_lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_without_locks_of_the_kernel_the_named_holder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some mounts of Lustre: there too a run is locked, and none is taken over."""

    def missing(lock: UnixFileLock) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(UnixFileLock, "acquire", missing)
    with run_lock(tmp_path), pytest.raises(ConfigError, match=_own_name()), run_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"process", b'{"host": "a", "pid": 1}', b"\xff"])
def test_a_lock_that_names_nobody_is_not_broken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.lock").write_bytes(content)
    with pytest.raises(ConfigError, match="one that the file does not name"), run_lock(tmp_path):
        pass
    assert (tmp_path / "run.lock").read_bytes() == content


def test_a_directory_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be locked: .*"), run_lock(tmp_path / "file"):
        pass


def test_a_child_that_was_forked_does_not_release_it(tmp_path: Path) -> None:
    """It may leave the same block."""
    with ExitStack() as stack:
        stack.enter_context(run_lock(tmp_path))
        assert in_a_fork(stack.close) == 0
        assert (tmp_path / "run.lock").exists()
    assert not (tmp_path / "run.lock").exists()


def test_a_lock_that_somebody_else_holds_by_now_is_left_alone(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        _left_behind(tmp_path, "elsewhere")
    assert (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.fault(23, "of many that come at once one gets it")
def test_of_many_that_come_at_once_one_gets_it(tmp_path: Path, stale: bool) -> None:
    """With a look at the lock and a replacement after it, two could take over the same one."""
    folder = tmp_path / "run"
    for _ in range(2):
        folder.mkdir()
        if stale:
            _left_behind(folder, socket.gethostname())
        start, said, over = os.pipe(), os.pipe(), os.pipe()
        racers = [_racer(folder, start, said, over) for _ in range(RACERS)]
        os.write(start[1], bytes(RACERS))
        codes = b"".join(os.read(said[0], 1) for _ in racers)
        os.write(over[1], bytes(RACERS))
        for racer in racers:
            os.waitpid(racer, 0)
        for end in (*start, *said, *over):
            os.close(end)
        assert sorted(codes) == [0] + [ConfigError.exit_code] * (RACERS - 1)
        assert not list(folder.iterdir())
        folder.rmdir()


Pipe = tuple[int, int]


def _racer(folder: Path, start: Pipe, said: Pipe, over: Pipe) -> int:
    """A process that says 0 if it has got the lock, and holds it until all have said something."""
    child = fork()
    if child == 0:
        try:
            os.read(start[0], 1)
            with run_lock(folder):
                os.write(said[1], bytes([0]))
                os.read(over[0], 1)
        except ConfigError as error:
            os.write(said[1], bytes([error.exit_code]))
        finally:
            os._exit(0)
    return child
