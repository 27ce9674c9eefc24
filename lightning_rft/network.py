"""Addresses of this machine, as others on a network reach it."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from lightning_rft.errors import ConfigurationError

__all__ = ["LOOPBACK", "address_towards", "is_loopback", "keep_alive", "listen"]

#: Where nobody but this machine reaches it.
LOOPBACK = "127.0.0.1"

_PROBES = 4


def address_towards(host: str) -> str:
    """The address of this machine's interface that leads to a host, which is not contacted."""
    family, kind, protocol, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as line:
        line.connect(place)  # of datagrams, it only chooses the way
        return str(line.getsockname()[0])


def listen(host: str, backlog: int) -> socket.socket:
    """A socket that listens at one address of this machine and no other, at a port that the operating system chooses.

    Raises:
        ConfigurationError: This machine has no such address.
    """
    try:
        family, *_, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=backlog)
    except OSError as error:
        raise ConfigurationError(
            f"nothing can listen at {host!r} ({error}): give an address of the trainer's own machine"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether a host name or address leads back to the machine that uses it, as far as that shows."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def keep_alive(line: socket.socket, silence_s: float) -> None:
    """Has the system end a connection whose other side has not answered it for so long, whether or not anyone sends."""
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = max(1, round(silence_s / (_PROBES + 1)))
    for name, value in {
        "TCP_KEEPIDLE": every,
        "TCP_KEEPALIVE": every,  # what macOS calls it
        "TCP_KEEPINTVL": every,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": round(1000 * silence_s),  # Linux: also while something is under way
    }.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
