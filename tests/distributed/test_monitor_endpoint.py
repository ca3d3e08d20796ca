"""Where the monitor listens: only where the ranks come from, if that is known."""

from __future__ import annotations

import socket

import pytest

from worm_dist.distributed import monitor_endpoint
from worm_dist.distributed.init import RankInfo
from worm_dist.distributed.monitor_endpoint import listen

EVERYWHERE = {"::", "0.0.0.0"}


def _listens_at(rank_info: RankInfo) -> tuple[str, str]:
    """The address it is bound to, and the one that the ranks are told."""
    server, address = listen(rank_info)
    with server:
        return str(server.getsockname()[0]), address


def test_on_one_host_it_is_the_loopback_interface() -> None:
    """It was all interfaces."""
    for address, local_world_size in (("127.0.0.1", 2), ("127.0.0.1", 1), ("localhost", 1)):
        bound, told = _listens_at(RankInfo(0, 2, 0, local_world_size, address, 29400))
        assert bound == told and bound in {"127.0.0.1", "::1"}


def test_with_other_hosts_it_is_the_interface_that_leads_to_them() -> None:
    """The address is of those that are set aside for documentation; nothing is sent to it."""
    rank_info = RankInfo(0, 2, 0, 1, "192.0.2.1", 29400)
    if monitor_endpoint._own_address(rank_info) is None:
        pytest.skip("the machine has no way to other hosts")
    bound, told = _listens_at(rank_info)
    assert bound == told and bound not in EVERYWHERE


@pytest.mark.parametrize(
    ("own", "local_world_size", "bound", "told"),
    [
        ("127.0.0.1", 2, {"127.0.0.1"}, "127.0.0.1"),
        # Debian's /etc/hosts leads a host's own name there, on this host only.
        ("127.0.0.1", 1, EVERYWHERE, "node7"),
        (None, 1, EVERYWHERE, "node7"),
        ("192.0.2.1", 1, EVERYWHERE, "192.0.2.1"),
    ],
)
def test_where_that_is_not_known_it_is_everywhere(
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    local_world_size: int,
    bound: set[str],
    told: str,
) -> None:
    monkeypatch.setattr(monitor_endpoint, "_own_address", lambda _: own)
    listens_at = _listens_at(RankInfo(0, 2, 0, local_world_size, "node7", 29400))
    assert listens_at[0] in bound
    assert listens_at[1] == told


def test_everywhere_includes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_endpoint, "_own_address", lambda _: None)
    server, _ = listen(RankInfo(0, 2, 0, 1, "node7", 29400))
    with server, socket.create_connection(("127.0.0.1", server.getsockname()[1]), timeout=5):
        server.accept()[0].close()
