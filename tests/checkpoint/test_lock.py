"""One run writes to one directory."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checkpoint.crashes import fork, in_a_fork
from tests.checkpoint.locks import pid_in, refused
from worm_dist import ConfigError
from worm_dist.checkpoint import lock
from worm_dist.checkpoint.lock import run_lock

RACERS = 6


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """No patience with holders, none of which is about to release the lock."""
    monkeypatch.setattr(lock, "_SECONDS", 0.1)


def test_the_lock_says_who_holds_it_and_is_gone_afterwards(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        said = json.loads((tmp_path / "run.lock").read_text())
        assert (said["pid"], said["host"]) == (os.getpid(), socket.gethostname())
    assert not list(tmp_path.iterdir())


def test_it_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(23, "the second is refused")
@pytest.mark.usefixtures("brief")
def test_a_second_run_is_refused_and_leaves_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = f"process {os.getpid()} on {socket.gethostname()}"
    text = rf"{re.escape(str(tmp_path))}/run\.lock: .* {own}"

    with run_lock(tmp_path):
        refused(tmp_path, text)  # of the same process
        assert not caplog.records, "at once: the kernel knows that the first one is alive"
        assert in_a_fork(lambda: refused(tmp_path, text)) == 0
        assert (tmp_path / "run.lock").exists()


@pytest.mark.fault(23, "that of a killed run is taken over")
def test_that_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    def killed() -> None:
        with run_lock(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(killed) == -signal.SIGKILL
    assert (tmp_path / "run.lock").exists()
    with run_lock(tmp_path):
        assert pid_in(tmp_path) == os.getpid()
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


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.fault(23, "of many that come at once one gets it")
@pytest.mark.usefixtures("brief")
def test_of_many_that_come_at_once_one_gets_it(tmp_path: Path, stale: bool) -> None:
    """With a look at the lock and a replacement after it, two could take over the same one."""
    folder = tmp_path / "run"
    for _ in range(2):
        folder.mkdir()
        if stale:
            in_a_fork(lambda: _killed_in(folder))
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


def _killed_in(folder: Path) -> None:
    with run_lock(folder):
        os.kill(os.getpid(), signal.SIGKILL)


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
