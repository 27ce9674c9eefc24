"""Explorers that come by themselves, from any machine: ``lightning-rft join HOST:PORT``."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from lightning_rft.channel import Channel
from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.launcher import Handle, Launcher, Place
from lightning_rft.explorer.reception import Guest, Reception
from lightning_rft.explorer.secret import VARIABLE, read_secret, write_secret
from lightning_rft.network import address_towards

__all__ = ["Admission", "DialIn", "DialledProcess", "host_and_port"]

_BACKLOG = 128
_ANY = ("0.0.0.0", "::", "")
_SECRET = "join-secret"


@dataclass(frozen=True)
class Admission:
    """To a process that has dialled in: the place that it takes, or why it cannot be taken."""

    place: Place | None
    refusal: str = ""
    silence_s: float = 0.0


class DialIn(Launcher):
    """Waits for explorers that dial in, started by Slurm, Kubernetes, ssh or by hand.

    On each machine, once for every explorer there::

        lightning-rft join HOST:PORT --secret-file FILE

    with what the trainer prints when it begins to listen. The run begins when all of the pool's explorers have come,
    and goes on as long as one is left: an explorer that comes later takes the place of one that died, and one that
    comes when none is vacant waits. Connections are authenticated, not encrypted: keep them in a private network.

    Args:
        bind: Address and port to listen at, such as ``"0.0.0.0:29600"`` for all interfaces. Left out, the loopback
            interface alone, and a port that the system chooses.
        address: Host name or address at which explorers reach this machine; left out, that of ``bind``, or where that
            is every interface, the one that leads to other networks.
        silence_s: Seconds for which a connection may be cut; after these its explorer counts as dead. While more is to
            be sent than the system's buffers take, it is 20 at most.

    Raises:
        ConfigurationError: ``bind`` is no address with a port, or ``silence_s`` is below 1.

    Example::

        explorers = rft.ExplorerPool(rft.VLLMEngine(), count=2, launcher=rft.DialIn(bind="0.0.0.0:29600"))
    """

    def __init__(self, bind: str = "127.0.0.1:0", address: str | None = None, silence_s: float = 60.0) -> None:
        self._host, self._port = host_and_port(bind, "DialIn(bind={!r})")
        if silence_s < 1:
            raise ConfigurationError(f"DialIn(silence_s={silence_s}) must be at least 1")
        self.bind = bind
        self.address = address or ("" if self._host in _ANY else self._host)
        self.silence_s = silence_s
        self._secret: bytes | None = None  # kept, for explorers that dial in again for another call of the trainer
        self._secret_file: Path | None = None
        self._reception: Reception | None = None
        self._refusal = ""  # of the explorer that was refused last

    @property
    def port(self) -> int:
        """The port that it listens at; 0 before it does if the system chooses one."""
        return self._port

    @override
    def open(self, folder: Path, count: int) -> None:
        self.address = self.address or _own_address()
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        both = self._host == "::" and socket.has_dualstack_ipv6()
        try:
            server = socket.create_server(
                (self._host, self._port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
            )
        except OSError as error:
            raise ConfigurationError(
                f"DialIn(bind={self.bind!r}) cannot be listened at ({error}): name an address of this "
                "machine, and a port that is free, or port 0"
            ) from error
        with contextlib.ExitStack() as ends:
            ends.enter_context(server)
            if os.environ.get(VARIABLE):
                self._secret = read_secret()
            else:
                self._secret_file = folder.absolute() / _SECRET
                self._secret = write_secret(self._secret_file, self._secret)
            self._port = server.getsockname()[1]
            self._refusal = ""
            self._reception = Reception(server, self._secret, self.silence_s)
            ends.pop_all()
        print(f"Explorers join by `{self.command}`", flush=True)  # noqa: T201

    @property
    def where(self) -> str:
        """Host and port that explorers dial."""
        return f"[{self.address}]:{self._port}" if ":" in self.address else f"{self.address}:{self._port}"

    @property
    def command(self) -> str:
        """What starts an explorer, on any machine that reaches this one."""
        secret = "" if self._secret_file is None else f" --secret-file {self._secret_file}"
        return f"lightning-rft join {self.where}{secret}"

    @override
    def launch(self, place: Place) -> Handle | None:
        assert self._reception is not None, "launch before open"
        while (guest := self._reception.take()) is not None:
            process = DialledProcess(guest, self.silence_s)
            refusal = guest.about.refusal()
            admission = Admission(None, refusal) if refusal else Admission(place, silence_s=self.silence_s)
            try:
                process.channel.send(admission)
            except OSError:  # it has gone
                refusal = refusal or f"{process.name} was gone before it could begin"
            if not refusal:
                return process
            self._refusal = refusal
            process.kill()
            process.channel.close()
        return None

    @property
    @override
    def missing(self) -> str:
        refused = f" ({self._refusal})" if self._refusal else ""
        return f"for each explorer run `{self.command}`{refused}, or raise the setting"

    @override
    def close(self) -> None:
        reception, self._reception = self._reception, None
        if reception is not None:
            reception.close()
        file, self._secret_file = self._secret_file, None
        if file is not None:
            file.unlink(missing_ok=True)


class DialledProcess(Handle):
    """An explorer's process at the other end of a connection, whose end is its end."""

    def __init__(self, guest: Guest, silence_s: float) -> None:
        self.name = f"the explorer on {guest.about.host} (joined by process {guest.about.pid})"
        self.log = f"the output of `lightning-rft join` (process {guest.about.pid}) on {guest.about.host}"
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


def _own_address() -> str:
    """This machine's address in the direction of other networks; nothing is sent."""
    try:
        return address_towards("192.0.2.1")  # reserved for documentation
    except OSError as error:
        raise ConfigurationError(
            f"this machine's address is not known ({error}): name it by DialIn(address=...)"
        ) from error
