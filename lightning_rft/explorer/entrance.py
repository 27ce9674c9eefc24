"""The entrance for explorers that dial in: a port at which those who know the run's secret are given places."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass

from typing_extensions import override

from lightning_rft.channel import Channel
from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.launcher import Handle, Place
from lightning_rft.explorer.reception import Guest, Reception

__all__ = ["EVERYWHERE", "Admission", "DialledProcess", "Entrance", "host_and_port", "with_port"]

#: What stands for all addresses of a machine.
EVERYWHERE = ("0.0.0.0", "::", "")

_BACKLOG = 128


@dataclass(frozen=True)
class Admission:
    """To a process that has dialled in: the place that it takes, or why it cannot be taken."""

    place: Place | None
    refusal: str = ""
    silence_s: float = 0.0


class Entrance:
    """Listens at an address and port, or at a port that the system chooses if that is 0, until it is closed.

    A connection may be cut for ``silence_s`` seconds. ``setting`` is what names the address, for messages.

    Raises:
        ConfigurationError: This machine has no such address, or the port is taken.
    """

    def __init__(self, host: str, port: int, secret: bytes, silence_s: float, setting: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = host == "::" and socket.has_dualstack_ipv6()
        try:
            server = socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
        except OSError as error:
            raise ConfigurationError(
                f"{setting} cannot be listened at ({error}): name an address of this machine, and a port that is free, "
                "or port 0"
            ) from error
        #: Why the explorer that was refused last could not be taken.
        self.refusal = ""
        self._silence_s = silence_s
        with contextlib.ExitStack() as ends:
            ends.enter_context(server)
            self.port: int = server.getsockname()[1]
            self._reception = Reception(server, secret, silence_s)
            ends.pop_all()

    def admit(self, place: Place) -> DialledProcess | None:
        """Gives a place to the explorer that has waited longest for it, if there is one."""
        while (guest := self._reception.take(place.slot)) is not None:
            process = DialledProcess(guest, self._silence_s)
            refusal = guest.about.refusal()
            admission = Admission(None, refusal) if refusal else Admission(place, silence_s=self._silence_s)
            try:
                process.channel.send(admission)
            except OSError:  # it has gone
                refusal = refusal or f"{process.name} was gone before it could begin"
            if not refusal:
                return process
            self.refusal = refusal
            process.kill()
            process.channel.close()
        return None

    def close(self) -> None:
        """Listens no more and sends away all who wait; safe to call twice."""
        self._reception.close()


class DialledProcess(Handle):
    """An explorer's process at the other end of a connection, whose end is its end."""

    def __init__(self, guest: Guest, silence_s: float) -> None:
        self.name = f"the explorer on {guest.about.host} (joined by process {guest.about.pid})"
        self.log = f"the output of `lightning-rft join` (process {guest.about.pid}) on {guest.about.host}"
        self.about = guest.about
        self._line: socket.socket | None = guest.line
        self._lock = threading.Lock()
        guest.line.setblocking(True)
        self.channel = Channel(os.dup(guest.line.fileno()), silence_s=silence_s)

    @override
    def kill(self) -> None:
        # the end of its connection is the end of its process group
        with self._lock, contextlib.suppress(OSError):
            line, self._line = self._line, None
            if line is not None:
                with line:
                    line.shutdown(socket.SHUT_RDWR)

    @override
    def status(self, timeout_s: float) -> str | None:
        deadline = time.monotonic() + timeout_s
        try:
            while time.monotonic() < deadline:
                self.channel.receive_packed(max(0.0, deadline - time.monotonic()))
            self.channel.receive_packed(0)
        except TimeoutError:
            pass
        except (EOFError, OSError):
            return "is gone: its connection has ended"
        return None


def host_and_port(address: str, setting: str) -> tuple[str, int]:
    """Splits ``host:port``, or ``[host]:port`` with an address of IPv6; raises :class:`ConfigurationError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(f"{setting.format(address)} is no HOST:PORT, such as 10.0.0.1:29600")
    return host.removeprefix("[").removesuffix("]"), int(port)


def with_port(host: str, port: int) -> str:
    """The reverse of :func:`host_and_port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
