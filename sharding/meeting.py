"""How the processes of a run meet: all connect to process 0, which checks that they fit together.

JAX's own service ends a process with a stack trace where another one is late or was started with
another number of processes. So the processes meet here first, with errors that a user can mend.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

from moejax.errors import UserError

__all__ = ["KEEP_ALIVE", "Meeting", "meet", "receive", "send"]

_HELLO = "moejax processes 1"
_HELLO_SECONDS = 5.0
_LARGEST = 1 << 28  # bytes of a message

KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (
            *(("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)),
            ("TCP_USER_TIMEOUT", 30_000),  # ms; of what was sent and is not confirmed
        )
        if hasattr(socket, name)
    ),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
"""Options of a connection: a host that is cut off is noticed after 30 seconds."""


@dataclass
class Meeting:
    """What the processes know of each other when all are there.

    hosts: names of the machines, one a process.
    told: what process 0 tells all.
    peers: connections by the number of the process; process 0 has all, others process 0's.
    """

    process: int
    processes: int
    hosts: tuple[str, ...]
    told: dict[str, Any] = field(default_factory=dict)
    peers: dict[int, socket.socket] = field(default_factory=dict)


def meet(
    address: str, processes: int, process: int, seconds: float, facts: dict[str, str], told: Any
) -> Meeting:
    """Waits until all processes are there.

    Args:
        address: `HOST:PORT` at which process 0 listens.
        processes: how many there are.
        process: the number of this one, from 0.
        seconds: to wait at most.
        facts: by name, what must be the same in all processes, such as a version.
        told: process 0's word to all: a dict that JSON can hold.

    Raises:
        UserError: process 0 cannot be reached or listen, processes are missing when the time is
            over, or they do not fit together.
    """
    host, port = _split(address)
    end = time.monotonic() + seconds
    hello = {"hello": _HELLO, "process": process, "processes": processes, "facts": facts}
    hello["host"] = socket.gethostname()
    if process:
        return _visit(host, port, hello, end, seconds)
    return _receive_all(port, hello, end, seconds, told)


def send(connection: socket.socket, message: Any) -> None:
    """Sends a message; raises OSError where the other side is gone."""
    content = json.dumps(message).encode()
    connection.sendall(struct.pack("!I", len(content)) + content)


def receive(connection: socket.socket) -> Any:
    """The next message; None where the connection has ended.

    Raises:
        OSError: it broke, or took longer than the socket's time limit.
        ValueError: what came is no message.
    """
    head = _read(connection, 4)
    if head is None:
        return None
    (size,) = struct.unpack("!I", head)
    if size > _LARGEST:
        raise ValueError(f"a message of {size} bytes")
    content = _read(connection, size)
    return None if content is None else json.loads(content)


def _read(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"--coordinator {address}: write HOST:PORT, the host of process 0 and a free port there"
        )
    return host.strip("[]"), int(port)


def _visit(host: str, port: int, hello: dict[str, Any], end: float, seconds: float) -> Meeting:
    """Of a process other than 0."""
    where = f"--coordinator {host}:{port}"
    reason, pause = "", 0.1
    while True:
        try:
            connection = socket.create_connection(
                (host, port), timeout=max(0.1, min(5.0, end - time.monotonic()))
            )
            break
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() + pause >= end:
            raise UserError(
                f"{where}: process 0 cannot be reached within {seconds:g} s ({reason}): check that "
                "it runs there and that its host and port can be reached from here; "
                "--join-timeout waits longer"
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    # Process 0 decides when the time is over; its word may take a moment.
    connection.settimeout(max(0.1, end - time.monotonic()) + _HELLO_SECONDS)
    try:
        send(connection, hello)
        answer = receive(connection)
    except TimeoutError:
        connection.close()
        raise UserError(
            f"{where}: process 0 has not answered within {seconds:g} s: see what it waits for, and "
            "start all processes at about the same time; --join-timeout waits longer"
        ) from None
    except (OSError, ValueError):
        answer = None
    if not isinstance(answer, dict) or "refused" in answer:
        connection.close()
    if not isinstance(answer, dict):
        raise UserError(
            f"{where}: process 0 has ended, or what listens there is another program: see what "
            "process 0 said, and choose a free port"
        )
    if "refused" in answer:
        raise UserError(answer["refused"])
    peers = {0: connection}
    hosts = tuple(answer["hosts"])
    return Meeting(hello["process"], hello["processes"], hosts, answer["told"], peers)


def _receive_all(
    port: int, hello: dict[str, Any], end: float, seconds: float, told: Any
) -> Meeting:
    """Of process 0."""
    processes = hello["processes"]
    peers: dict[int, socket.socket] = {}
    hosts = {0: hello["host"]}
    wrong = ""
    _allow_files(processes)
    with _listening(port) as server:
        while len(peers) < processes - 1 and not wrong:
            server.settimeout(max(0.05, end - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(processes) if i not in hosts]
                wrong = (
                    f"--processes {processes}: {len(hosts)} have come within {seconds:g} s, not "
                    f"process {', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}: check "
                    "that all were started with the same --coordinator; --join-timeout waits longer"
                )
                break
            visitor = _greeted(connection)
            if visitor is None:
                connection.close()  # somebody else's
                continue
            number = visitor["process"]
            wrong = _misfit(visitor, hello, hosts)
            # One that does not fit is told so, too.
            peers[number if number not in peers else -1] = connection
            hosts.setdefault(number, visitor["host"])
    if wrong:
        for peer in peers.values():
            with contextlib.suppress(OSError):
                send(peer, {"refused": wrong})
                peer.close()
        raise UserError(wrong)
    names = tuple(hosts[i] for i in range(processes))
    for peer in peers.values():
        with contextlib.suppress(OSError):  # the lifeline will notice
            send(peer, {"hosts": names, "told": told})
    return Meeting(0, processes, names, told, peers)


def _allow_files(processes: int) -> None:
    """Every connection is a file of this process, of which the usual limit is 1024."""
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard and soft < processes + 1024:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, processes + 1024), hard))


def _listening(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"--coordinator …:{port}: process 0 cannot listen there ({error.strerror or error}): "
            "choose a free port, and give --process 0 to one process only"
        ) from None


def _greeted(connection: socket.socket) -> Any:
    connection.settimeout(_HELLO_SECONDS)
    try:
        said = receive(connection)
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and said.get("hello") == _HELLO else None


def _misfit(visitor: dict[str, Any], own: dict[str, Any], hosts: dict[int, str]) -> str:
    """Why a process cannot take part; empty where it can."""
    number, processes = visitor["process"], own["processes"]
    who = f"process {number} on {visitor['host']}"
    if visitor["processes"] != processes:
        return (
            f"--processes: {who} was started with {visitor['processes']} and process 0 with "
            f"{processes}: give all the same"
        )
    if number in hosts:
        return (
            f"--process {number}: given twice, on {hosts[number]} and on {visitor['host']}: give "
            f"each process a number of its own, from 0 to {processes - 1}"
        )
    for name, value in own["facts"].items():
        if visitor["facts"].get(name) != value:
            return (
                f"{name}: {who} has {visitor['facts'].get(name)} and process 0 has {value}: "
                "install the same on all hosts"
            )
    return ""
