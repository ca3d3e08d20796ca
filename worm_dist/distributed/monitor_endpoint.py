"""Where the monitor listens, and how every rank connects to it."""

from __future__ import annotations

import contextlib
import socket
from ipaddress import ip_address
from pathlib import Path

import torch.distributed as dist

from ..errors import BackendError
from .authentication import authenticate_to_monitor, new_secret
from .connection import JsonConnection
from .error_report import one_line
from .init import RankInfo
from .monitor import MonitorServer

__all__ = ["connect_to_monitor", "listen"]


def connect_to_monitor(
    rank_info: RankInfo, seconds: float, grace_seconds: float, stacks: Path
) -> tuple[MonitorServer | None, JsonConnection]:
    """Start the monitor on rank zero and connect every rank to it.  Collective.

    Args:
        rank_info: this process's rank information.
        seconds: limit on the wait for the monitor to accept this rank.
        grace_seconds: time that a rank may take to answer the monitor.
        stacks: folder for the stacks of the ranks, on rank zero's host.

    Returns:
        The monitor, on rank zero only, and this rank's connection to it.

    Raises:
        BackendError: another rank is gone, or rank zero cannot be reached.
    """
    monitor = None
    endpoint: list[tuple[str, int, bytes] | None] = [None]
    if rank_info.rank == 0:
        secret = new_secret()
        server, own_address = listen(rank_info)
        endpoint = [(own_address, server.getsockname()[1], secret)]
        monitor = MonitorServer(server, secret, rank_info.world_size, grace_seconds, stacks)
        monitor.start()
    try:
        # In clear, as everything between the ranks.  It is simpler than through the store, and
        # safer: any program that reaches the store can read its keys, during the whole run, and
        # torchrun's store keeps them even longer.
        dist.broadcast_object_list(endpoint, src=0)
    except RuntimeError as error:
        raise BackendError(
            f"launch: rank {rank_info.rank} has lost another rank before the run began: "
            f"{one_line(error)}; see that rank's own error"
        ) from error
    assert endpoint[0] is not None
    address, port, secret = endpoint[0]
    try:
        with contextlib.ExitStack() as on_error:
            connection = JsonConnection(socket.create_connection((address, port), timeout=seconds))
            on_error.callback(connection.close)
            authenticate_to_monitor(connection, secret, rank_info.rank, seconds)
            on_error.pop_all()
    except (OSError, EOFError) as error:
        raise BackendError(
            f"launch: rank {rank_info.rank} cannot reach rank 0 at {address}:{port}: {error}; the "
            "ranks must be able to connect to one another, at any port"
        ) from error
    return monitor, connection


def listen(rank_info: RankInfo) -> tuple[socket.socket, str]:
    """A listening socket on rank zero, and the address by which the ranks reach it.

    Rank zero may be on another host than the store that ``MASTER_ADDR`` names.  Its own address is
    the one from which it would connect to that store, and it listens there only.

    On the store's own host that is often the loopback address, which is of use only if all ranks
    are on this host.  Ranks on other hosts use the store's name.  They may resolve it to any
    address of this host, or, in front of a NAT, to one that no interface here has.  Rank zero
    cannot tell which, so it then listens on all interfaces.
    """
    own = _own_address(rank_info)
    if own is None or (_is_loopback(own) and not _is_single_host(rank_info)):
        return _listen_everywhere(rank_info.world_size), rank_info.address
    try:
        family, _, _, _, address = socket.getaddrinfo(own, 0, type=socket.SOCK_STREAM)[0]
        server = socket.create_server(address, family=family, backlog=rank_info.world_size)
    except OSError:  # no interface has it (any longer)
        server = _listen_everywhere(rank_info.world_size)
    return server, own


def _listen_everywhere(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
        )
    return socket.create_server(("", 0), backlog=backlog)


def _own_address(rank_info: RankInfo) -> str | None:
    """The address from which this host would connect to the store; None if it is not known."""
    try:
        family, *_, store_address = socket.getaddrinfo(
            rank_info.address, rank_info.port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(store_address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback


def _is_single_host(rank_info: RankInfo) -> bool:
    """Whether all ranks are certainly on this host."""
    if rank_info.local_world_size == rank_info.world_size or rank_info.address == "localhost":
        return True
    try:
        return _is_loopback(rank_info.address)
    except ValueError:  # a name, which other hosts may resolve otherwise
        return False
