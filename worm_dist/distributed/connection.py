"""Line: words between two processes, beside whatever torch sends.

It is silent while all is well.  When a process dies, its kernel ends the line, so that the other
end knows at once, whatever the backend of the gradients does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from typing import Any, TypeAlias

__all__ = ["JsonConnection", "Words"]

Words: TypeAlias = dict[str, Any]

_SECONDS_TO_SEND = 5
# A host that has lost its power ends no line; after this it counts as ended.
_SECONDS_OF_SILENCE, _SECONDS_BETWEEN_PROBES, _PROBES = 10, 5, 4


class JsonConnection:
    """JSON objects over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SECONDS_TO_SEND)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _SECONDS_OF_SILENCE),
            ("TCP_KEEPINTVL", _SECONDS_BETWEEN_PROBES),
            ("TCP_KEEPCNT", _PROBES),
        ):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        # A loader process would keep the line open for seconds after its rank was killed.
        os.register_at_fork(after_in_child=connection.close)
        self._connection = connection
        self._ready = select.poll()
        self._ready.register(connection, select.POLLIN)
        self._begun = b""

    def fileno(self) -> int:
        """For ``select``."""
        return self._connection.fileno()

    def say(self, **words: Any) -> None:
        """Send an object; to one who has gone, nothing.  That is noticed by listening."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(words).encode() + b"\n")

    def heard(self) -> list[Words]:
        """The objects that have come, once there is something to read; it may be half of one.

        Raises:
            EOFError: the other end has gone, or does not speak like us.
        """
        try:
            came = self._connection.recv(65536)
        except OSError as error:
            raise EOFError from error
        if not came:
            raise EOFError
        *whole, self._begun = (self._begun + came).split(b"\n")
        try:
            said = [json.loads(words) for words in whole]
        except ValueError as error:  # somebody looks for open ports
            raise EOFError from error
        return [words for words in said if isinstance(words, dict)]

    def heard_within(self, seconds: float) -> list[Words]:
        """The objects that come in that time, none if nothing does.

        Raises:
            EOFError: the other end has gone.
        """
        return self.heard() if self._ready.poll(1000 * max(0.0, seconds)) else []

    def close(self) -> None:
        """Hang up."""
        self._connection.close()
