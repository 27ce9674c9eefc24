"""Addresses of this machine, as others on a network reach it."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from lightning_rft.errors import ConfigurationError

__all__ = ["LOOPBACK", "address_towards", "is_loopback", "listen"]

#: Where nobody but this machine reaches it.
LOOPBACK = "127.0.0.1"


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
