"""Pages of TensorBoard as people see them: a real server, opened in headless Chromium.

``python -m tests.training.board_pages RUNS PICTURE [PAGE]`` writes a picture of a folder of runs,
such as the one that the documentation shows.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

__all__ = ["CHROMIUM", "PAGES", "Board", "served"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGES = {
    "glance": ("custom_scalars&_smoothingWeight=0", 770),
    "images": ("images", 1000),
    "texts": ("text", 1000),
    "table": ("hparams", 500),
}
"""The address of each page, behind the server's, and the height in pixels of its picture."""
_WIDTH = 1500
_PATIENCE = 120.0
"""Seconds to wait for the server, for its reading of the runs, and for the browser."""
_VIRTUAL_MILLISECONDS = 20_000
"""Time that passes for the page; it passes faster than ours while the page only waits."""


class Board:
    """A running server.

    Args:
        address: its address, such as ``http://localhost:6006``.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def data(self, path: str, body: Any = None, **query: str) -> Any:
        """What the page is filled with, such as ``plugin/text/tags``: JSON, or else bytes.

        Args:
            path: the path below ``/data/``.
            body: what to POST as JSON; None to GET.
            query: the query of the address.
        """
        where = f"{self._address}/data/{path}?{urlencode(query)}"
        posted = None if body is None else json.dumps(body).encode()
        request = Request(where, posted, {"Content-Type": "application/json"})
        with urlopen(request, timeout=_PATIENCE) as answer:
            content = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
        return json.loads(content) if is_json else content

    def wait_for(self, is_there: Callable[[], Any]) -> Any:
        """Ask until there is an answer, since the server reads the runs while it serves; return it.

        Raises:
            TimeoutError: there is none in time.
        """
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                found = is_there()
            except URLError:  # not listening, or the data are not there yet
                found = None
            if found:
                return found
            time.sleep(0.1)
        raise TimeoutError(f"TensorBoard at {self._address} has not answered in {_PATIENCE:g} s")

    def picture(self, page: str, file: Path) -> None:
        """Write a picture of a page as PNG.

        Args:
            page: a name in ``PAGES``.
            file: the file to write.
        """
        assert CHROMIUM is not None
        address, height = PAGES[page]
        with tempfile.TemporaryDirectory() as profile:
            subprocess.run(
                [
                    CHROMIUM,
                    "--headless",
                    "--no-sandbox",  # it refuses to run as root with one
                    "--disable-gpu",
                    "--hide-scrollbars",
                    f"--user-data-dir={profile}",
                    f"--window-size={_WIDTH},{height}",
                    f"--virtual-time-budget={_VIRTUAL_MILLISECONDS}",
                    f"--screenshot={file}",
                    f"{self._address}/?darkMode=false#{address}",
                ],
                check=True,
                capture_output=True,
                timeout=_PATIENCE,
            )


@contextmanager
def served(runs: Path) -> Iterator[Board]:
    """Serve the runs in a folder on a free port, as ``tensorboard --logdir RUNS`` does."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["--logdir", str(runs), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words, "--reload_interval", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    board = Board(f"http://127.0.0.1:{port}")
    try:
        board.wait_for(lambda: board.data("runs"))
        yield board
    finally:
        server.terminate()
        server.wait()


def main(runs: Path, picture: Path, page: str = "glance") -> None:
    """Write a picture of the runs in a folder."""
    if CHROMIUM is None:
        raise SystemExit("chromium is not installed; on Debian: apt-get install chromium")
    with served(runs) as board:
        folders = {path.parent.name for path in runs.glob("*/events.out.tfevents.*")}
        board.wait_for(lambda: folders <= set(board.data("runs")))
        board.picture(page, picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
