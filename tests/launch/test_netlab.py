"""Two hosts on one machine.  Where it cannot run, it says so; each test holds it to one or the
other."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow("makes hosts in network namespaces")

NETLAB = Path(__file__).parents[2] / "launch" / "netlab"
REFUSED = 6


def _netlab(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end; whatever the end is, nothing is left."""
    return _ended(_started(*words, **environment))


def _started(*words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [NETLAB, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        # What a shell ignores from its start on, as jobs in the background do, it cannot trap.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def _ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=30)
    assert _namespaces(process.pid) == []
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@functools.cache
def _can_run() -> bool:
    """Tried without netlab's help: a namespace, an interface in it, a slow queue on that."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        return False
    host = Path(tempfile.mkdtemp(prefix="netlab-probe-")).name
    try:
        return all(
            subprocess.run(command.split(), capture_output=True).returncode == 0
            for command in (
                f"ip netns add {host}",
                f"ip link add probe netns {host} type veth peer name other netns {host}",
                f"tc -n {host} qdisc add dev probe root tbf rate 1mbit burst 256kb latency 200ms",
            )
        )
    finally:
        subprocess.run(["ip", "netns", "delete", host], capture_output=True)


def _namespaces(pid: int) -> list[Path]:
    """What this netlab has made; others may run beside it."""
    return list(Path("/run/netns").glob(f"netlab-{pid:x}-*"))


def _runs(pid: int) -> bool:
    """A process that has ended may still wait for somebody to ask for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _assert_refused(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == REFUSED
    assert done.stderr.startswith("netlab: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def _script(text: str) -> tuple[str, ...]:
    return ("--rate", "100mbit", "--", "bash", "-c", text)


def test_each_rank_has_a_host_of_its_own() -> None:
    seen = 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $NETLAB_RATE $OMP_NUM_THREADS $MASTER_ADDR"'
    network = 'ls /sys/class/net | xargs; ip -4 -o address show dev "$GLOO_SOCKET_IFNAME"'
    done = _netlab(*_script(f'sleep "0.$RANK"; echo "$({seen}; {network})"'))
    if not _can_run():
        return _assert_refused(done)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for rank in range(2):
        assert f"{rank} 2 0 100mbit 1 198.18.0.1\nlab0 lo\n" in done.stdout
        assert f"inet 198.18.0.{rank + 1}/30" in done.stdout


def test_the_link_is_as_slow_as_asked() -> None:
    # 2.5 MB at 10 Mbit/s are two seconds; a queue of 256 kB passes at once.
    done = _netlab(
        "--rate",
        "10mbit",
        "--",
        sys.executable,
        "-c",
        "import os, socket, time\n"
        "address = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))\n"
        "if os.environ['RANK'] == '0':\n"
        "    link = socket.create_server(address).accept()[0]\n"
        "    begin, size = time.monotonic(), 0\n"
        "    while read := link.recv(65536): size += len(read)\n"
        "    print(size, time.monotonic() - begin)\n"
        "else:\n"
        "    for _ in range(100):\n"
        "        try: link = socket.create_connection(address); break\n"
        "        except OSError: time.sleep(0.05)\n"
        "    link.sendall(bytes(2_500_000))\n",
    )
    if not _can_run():
        return _assert_refused(done)
    assert done.returncode == 0, done.stderr
    size, seconds = done.stdout.split()
    assert size == "2500000"
    assert float(seconds) > 1.5


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_failure_is_the_exit_code_and_stops_the_other(rank: int) -> None:
    begin = time.monotonic()
    # The other one would take a minute, and would end with 7 when it is told to stop.
    text = f"[ $RANK = {rank} ] && exit 5; trap 'exit 7' TERM; sleep 60 & wait"
    done = _netlab(*_script(text))
    if not _can_run():
        return _assert_refused(done)
    assert done.returncode == 5
    assert "one rank ended with exit code 5" in done.stderr
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_an_interruption(sent: signal.Signals, tmp_path: Path) -> None:
    # One of them does not listen to SIGINT, nor does a child of its own.
    text = f"trap '' INT; sleep 60 & echo $! > {tmp_path}/$RANK; wait"
    process = _started(*_script(text))
    if not _can_run():
        return _assert_refused(_ended(process))
    deadline = time.monotonic() + 10
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # until the numbers are written, too
    children = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(children) == 2
    assert all(map(_runs, children))
    assert len(_namespaces(process.pid)) == 2
    process.send_signal(sent)
    assert _ended(process).returncode == 128 + sent
    assert not any(map(_runs, children))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--rate", "fast", "--", "true"), "--rate 'fast': expected"),
        (("--rate", "5mbit;id", "--", "true"), "expected a whole number"),
        (("--delay", "1", "--", "true"), "--delay '1': expected"),
        (("--rate", "1gbit"), "no command; use"),
        (("--",), "no command; use"),
        (("true",), "true is no option"),
        (("--rate",), "no command; use"),
    ],
)
def test_a_wrong_option_is_one_clear_line(words: tuple[str, ...], says: str) -> None:
    done = _netlab(*words)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_without_iproute2_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    done = _netlab("--", "true", PATH=str(tmp_path))
    _assert_refused(done)
    assert "install iproute2" in done.stderr


def test_a_kernel_that_cannot_delay_is_told_or_delays() -> None:
    done = _netlab("--delay", "1ms", "--", "tc", "qdisc", "show", "dev", "lab0")
    if done.returncode == REFUSED:
        _assert_refused(done)
    else:
        assert done.returncode == 0, done.stderr
        assert "netem" in done.stdout and "delay 1ms" in done.stdout and "tbf" in done.stdout
