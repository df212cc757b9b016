"""How the ranks find each other: rank 0 opens a store and a listener, and says where by one broadcast.

The process group serves for that one message. After it the fence has connections of its own, so that it never competes
with the collectives of the training, and works whoever started the processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from zoo.store.lifeline import FenceError
from zoo.store.positions import Json, names

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_CONNECT = 10.0
"""Seconds for one address of rank 0."""
_ANSWER = 30.0
"""Seconds in which the right listener greets us."""


@dataclass(frozen=True)
class Group:
    """The ranks, and one way to send them a message from rank 0."""

    rank: int
    world_size: int
    broadcast: Callable[[Json], Json]


@dataclass(frozen=True)
class Meeting:
    """What this rank holds after all have met: the store, and sockets by rank (rank 0: all others; others: rank 0)."""

    store: TCPStore
    sockets: dict[int, socket.socket]


def group_of(fabric: Any | None) -> Group:
    """The ranks of a Fabric; without one those of the default process group, or this process alone."""
    if fabric is not None:
        return Group(fabric.global_rank, fabric.world_size, lambda message: fabric.broadcast(message, src=0))
    if not (dist.is_available() and dist.is_initialized()):
        return Group(0, 1, lambda message: message)
    return Group(dist.get_rank(), dist.get_world_size(), _broadcast)


def _broadcast(message: Json) -> Json:
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def meet(group: Group, *, timeout: float, notice: float) -> Meeting:
    """Connect all ranks; returns when every rank is connected.

    Raises:
        FenceError: rank 0 can not listen or be reached, or a rank did not come within ``timeout`` seconds.
    """
    return _host(group, timeout, notice) if group.rank == 0 else _visit(group, timeout)


def _host(group: Group, timeout: float, notice: float) -> Meeting:
    try:
        listener = _listen(group.world_size)
        store = _store("127.0.0.1", 0, is_host=True)
    except (OSError, RuntimeError) as error:
        group.broadcast({"error": str(error)})
        raise FenceError(f"rank 0 can not open a port for the fence: {error}.") from error
    nonce = secrets.token_hex(16)
    line_port = listener.getsockname()[1]
    group.broadcast(
        {
            "hostname": socket.gethostname(),
            "hosts": _own_names(),
            "store": store.port,
            "line": line_port,
            "nonce": nonce,
        }
    )
    with listener:
        sockets = _accept_all(listener, group, nonce, timeout, notice)
    for peer in sockets.values():
        with contextlib.suppress(OSError):  # who is gone already is noticed by those who listen
            peer.sendall(b"go\n")
    return Meeting(store, sockets)


def _store(host: str, port: int, *, is_host: bool) -> TCPStore:
    wait = timedelta(seconds=_ANSWER)
    store: TCPStore = dist.TCPStore(host, port, is_master=is_host, wait_for_workers=False, timeout=wait)  # type: ignore[attr-defined]
    return store


def _listen(world_size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=max(world_size, 16)
            )
        except OSError:
            pass  # IPv6 is compiled in and switched off
    return socket.create_server(("", 0), backlog=max(world_size, 16))


def _own_names() -> list[str]:
    """Names under which other machines may reach this one, the likeliest first."""
    found = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))  # sends nothing: asks the routing table for our address
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # a machine without a network has ranks of its own alone
    return list(dict.fromkeys(filter(None, found)))


def _accept_all(
    listener: socket.socket, group: Group, nonce: str, timeout: float, notice: float
) -> dict[int, socket.socket]:
    started, told = time.monotonic(), False
    sockets: dict[int, socket.socket] = {}
    while missing := set(range(1, group.world_size)) - set(sockets):
        waited = time.monotonic() - started
        if waited > timeout:
            for peer in sockets.values():
                peer.close()
            raise FenceError(f"{names(missing)} did not connect to the fence of rank 0 within {timeout:g} s.")
        if waited > notice and not told:
            told = True
            sys.stderr.write(f"zoo: rank 0 has waited {waited:.0f} s for {names(missing)} to connect.\n")
        listener.settimeout(min(1.0, timeout))
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            continue
        rank = _greet(peer, nonce)
        if rank in missing:
            sockets[rank] = peer
        else:
            peer.close()
    return sockets


def _greet(peer: socket.socket, nonce: str) -> int:
    """The rank of who has connected; -1 for a stranger, such as a port scanner."""
    try:
        peer.settimeout(_CONNECT)
        hello = json.loads(_read_line(peer))
        if not secrets.compare_digest(hello["nonce"], nonce):
            return -1
        peer.sendall(b"welcome\n")
        return int(hello["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _visit(group: Group, timeout: float) -> Meeting:
    at = group.broadcast(None)
    if "error" in at:
        raise FenceError(f"rank 0 can not open a port for the fence: {at['error']}.")
    tried: list[str] = []
    for host in _addresses(at):
        try:
            peer = _call(host, at, group.rank)
        except OSError as error:
            tried.append(f"{host} ({error})")
            continue
        return _enter(peer, host, at, timeout)
    raise FenceError(
        f"rank {group.rank} can not reach rank 0 at port {at['line']}: {', '.join(tried)}.",
        fix="The machines of a job must reach each other on any port; set MASTER_ADDR to the address of rank 0.",
    )


def _addresses(at: Json) -> Iterator[str]:
    if at["hostname"] == socket.gethostname():
        yield "127.0.0.1"
    yield from at["hosts"]


def _call(host: str, at: Json, rank: int) -> socket.socket:
    peer = socket.create_connection((host, at["line"]), timeout=_CONNECT)
    try:
        peer.sendall(json.dumps({"nonce": at["nonce"], "rank": rank}).encode() + b"\n")
        peer.settimeout(_ANSWER)
        if _read_line(peer) != b"welcome":
            raise OSError("another program listens there")
    except BaseException:
        peer.close()
        raise
    return peer


def _enter(peer: socket.socket, host: str, at: Json, timeout: float) -> Meeting:
    try:
        store = _store(host, at["store"], is_host=False)
        peer.settimeout(timeout + _ANSWER)
        go = _read_line(peer)
    except (OSError, RuntimeError) as error:
        peer.close()
        raise FenceError(f"the connection to rank 0 broke while the ranks met: {error}.") from error
    if go != b"go":
        peer.close()
        raise FenceError(f"not all ranks connected to the fence of rank 0 within {timeout:g} s; its log names them.")
    return Meeting(store, {0: peer})


def _read_line(peer: socket.socket) -> bytes:
    """Up to the newline and no byte further: what follows belongs to another reader. Empty when the peer is gone."""
    line = b""
    while (byte := peer.recv(1)) not in (b"", b"\n"):
        line += byte
    return line
