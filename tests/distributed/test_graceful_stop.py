"""Ranks that are asked to stop at any moment stop at one place, and none waits for another."""

from __future__ import annotations

import random
import socket
import threading
import time
from pathlib import Path

import pytest

from worm_dist.distributed.authentication import authenticate_to_monitor
from worm_dist.distributed.connection import JsonConnection
from worm_dist.distributed.graceful_stop import StopCoordinator, Stopped
from worm_dist.distributed.monitor import MonitorServer

SECRET = b"secret"


class _Rank(threading.Thread):
    """Takes steps together with the others, until it is stopped."""

    def __init__(self, number: int, connection: JsonConnection, step: threading.Barrier) -> None:
        super().__init__(daemon=True)
        self.num_steps = 0
        self.stop = StopCoordinator()
        self.stop.notify_by(lambda: connection.send(stop_requested=True))
        self._connection = connection
        self._step = step
        self._random = random.Random(number)
        authenticate_to_monitor(connection, SECRET, number, seconds=5)
        threading.Thread(target=self._watch, daemon=True).start()

    def run(self) -> None:
        try:
            while True:
                self._step.wait(5)  # as an all-reduce does
                time.sleep(0.002 * self._random.random())
                self.num_steps += 1
                self.stop.pass_boundary()
        except Stopped:
            pass

    def _watch(self) -> None:
        while True:
            message = self._connection.receive_within(5) or {}
            time.sleep(0.01 * self._random.random())
            if "hold" in message:
                self._connection.send(num_passed=self.stop.hold())
            elif "stop_at" in message:
                self.stop.stop_at(message["stop_at"])
            elif "all_done" in message:
                self._connection.close()
                return


@pytest.mark.parametrize("asked", [(0,), (2,), (0, 1, 2), (1, 1)])
@pytest.mark.parametrize("after_seconds", [0.0, 0.013, 0.05])
def test_all_stop_at_one_place(asked: tuple[int, ...], after_seconds: float) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    monitor = MonitorServer(server, SECRET, 3, 1.0, Path())
    monitor.start()
    step = threading.Barrier(3)
    connections = [JsonConnection(socket.create_connection(server.getsockname())) for _ in range(3)]
    ranks = [_Rank(number, connection, step) for number, connection in enumerate(connections)]
    for rank in ranks:
        rank.start()
    time.sleep(after_seconds)
    before = max(rank.num_steps for rank in ranks)
    for number in asked:
        ranks[number].stop.request()
    for rank in ranks:
        rank.join(5)
        assert not rank.is_alive()
    assert len({rank.num_steps for rank in ranks}) == 1
    assert ranks[0].num_steps >= before
    for connection in connections:
        connection.send(done=True)
    monitor.join(5)
    assert not monitor.is_alive()


def test_alone_it_is_the_next_place() -> None:
    stop = StopCoordinator()
    stop.pass_boundary()
    stop.request()
    assert stop.requested
    with pytest.raises(Stopped):
        stop.pass_boundary()
