"""One run writes to one directory."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checkpoint.ending import fork, in_a_fork
from worm_dist import ConfigError
from worm_dist.checkpoint import lock
from worm_dist.checkpoint.lock import run_lock

RACERS = 6


def _ended() -> int:
    """The number of a process that is over."""
    child = fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def _left_behind(folder: Path, **changes: object) -> None:
    holder = {"host": socket.gethostname(), "pid": _ended(), "began": "", **changes}
    (folder / "run.lock").write_text(json.dumps(holder))


def test_the_lock_says_who_holds_it_and_is_gone_afterwards(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        holder = json.loads((tmp_path / "run.lock").read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
    assert not list(tmp_path.iterdir())


def test_it_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(23, "the second is refused")
def test_a_second_run_is_refused_and_leaves_it(tmp_path: Path) -> None:
    text = (
        rf"{re.escape(str(tmp_path))}/run\.lock: .* process {os.getpid()} on {socket.gethostname()}"
    )

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
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_another_process_has_got_the_number_of_one_that_is_over(tmp_path: Path) -> None:
    """After a restart of the machine, and in a container, where numbers are always the same."""
    _left_behind(tmp_path, pid=os.getpid(), began="another-start 17")
    with run_lock(tmp_path):
        pass


def test_a_process_on_another_host_may_be_alive(tmp_path: Path) -> None:
    _left_behind(tmp_path, host="elsewhere")
    with pytest.raises(ConfigError, match=r"on elsewhere; .* remove the file"), run_lock(tmp_path):
        pass


def test_a_process_of_another_user_is_alive(tmp_path: Path) -> None:
    _left_behind(tmp_path, pid=1, began=lock._began(1))
    with pytest.raises(ConfigError, match="process 1 on"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b'{"host": "a", "pid": -1, "began": ""}', b"\xff"])
def test_a_lock_that_names_nobody_is_not_broken(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SECONDS_TO_WRITE", 0.1)
    (tmp_path / "run.lock").write_bytes(content)
    with pytest.raises(ConfigError, match="one that the file does not name"), run_lock(tmp_path):
        pass
    assert (tmp_path / "run.lock").read_bytes() == content


def test_a_holder_that_has_not_yet_written_its_name_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SECONDS_TO_WRITE", 20.0)  # the machine may be busy
    (tmp_path / "run.lock").touch()

    def late() -> None:
        time.sleep(0.2)
        _left_behind(tmp_path, host="elsewhere")

    child = fork()
    if child == 0:
        late()
        os._exit(0)
    with pytest.raises(ConfigError, match="on elsewhere"), run_lock(tmp_path):
        pass
    os.waitpid(child, 0)


def test_a_directory_that_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.lock: .* No such file"), run_lock(tmp_path / "no"):
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
        _left_behind(tmp_path, host="elsewhere")
    assert (tmp_path / "run.lock").exists()


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.fault(23, "of many that come at once one gets it")
def test_of_many_that_come_at_once_one_gets_it(tmp_path: Path, stale: bool) -> None:
    """With a look at the lock and a replacement after it, two could take over the same one."""
    folder = tmp_path / "run"
    for _ in range(2):
        folder.mkdir()
        if stale:
            _left_behind(folder)
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
