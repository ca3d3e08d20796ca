"""Strangers at the monitor's port, while ranks come and while they train."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from tests.faults.driver import STEP, Act, Driver, Fault, Run
from worm_dist.distributed import admission
from worm_dist.distributed.monitor import MonitorServer

pytestmark = pytest.mark.slow("a run of two ranks, before which 150 strangers come")

COMES = "worm_dist.distributed.monitor_endpoint:socket.create_connection"
WATCHED = "worm_dist.training.run:watched"
FINISH = "worm_dist.training.reporting.rank_zero:RankZeroReport.finish"
SAYINGS = (
    100_000 * b"[" + b"\n",
    2_000_000 * b"x",
    b"GET / HTTP/1.1\r\n\r\n",
    b'{"rank": 1}\n' * 9,
)
SILENT = 150

_strangers: list[socket.socket] = []
"""They stay as long as the process."""
_address: list[Any] = []


def _hasten(real: Act, *args: Any) -> Any:
    """On rank zero: nobody is let wait for ten seconds."""
    admission._SECONDS_TO_IDENTIFY = 0.6
    return real(*args)


def _come_after_strangers(real: Act, address: Any, *args: Any, **kwargs: Any) -> Any:
    _address.append(address)
    for saying in SAYINGS + SILENT * (b"",):
        stranger = socket.socket(socket.AF_INET)
        stranger.setblocking(False)
        _strangers.append(stranger)
        stranger.connect_ex(address)
        threading.Thread(target=_say, args=(stranger, saying), daemon=True).start()
    return real(address, *args, **kwargs)


def _say(stranger: socket.socket, saying: bytes) -> None:
    stranger.settimeout(5)
    try:
        if saying:
            stranger.sendall(saying)
    except OSError:
        pass


def _come_in_vain(real: Act, *args: Any) -> Any:
    """All ranks are there, so the port is closed."""
    with socket.socket(socket.AF_INET) as stranger, pytest.raises(ConnectionRefusedError):
        stranger.connect(_address[0])
    return real(*args)


def _finish_rested(real: Act, *args: Any) -> Any:
    """The monitor has not taken the interpreter from the training."""
    (monitor,) = (each for each in threading.enumerate() if isinstance(each, MonitorServer))
    assert monitor.ident is not None
    busy = time.clock_gettime(time.pthread_getcpuclockid(monitor.ident))
    assert busy < 0.5, f"{busy} s"
    return real(*args)


@pytest.mark.fault(35, "nonsense, lines without end and silence on 150 connections, at the start")
def test_strangers_do_not_disturb_a_run(driver: Driver) -> None:
    """The monitor died of deep JSON, and the run that had finished ended with exit code 6; it held
    each line without end in memory, and 150 silent connections for ever."""
    faults = (
        Fault.do(_hasten, rank=0, step=1).at(WATCHED),
        Fault.do(_come_after_strangers, rank=1, step=1).at(COMES),
        Fault.do(_come_in_vain, rank=1, step=3).at(STEP),
        Fault.do(_finish_rested, rank=0, step=1).at(FINISH),
    )
    ends = driver(2, Run(faults))
    assert [(end.exitcode, end.said) for end in ends] == [(0, "")] * 2
    assert json.loads((driver.out / "result.json").read_text())["status"] == "dense"
