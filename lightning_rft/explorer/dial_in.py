"""Explorers that come by themselves, from any machine: ``lightning-rft join HOST:PORT``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.entrance import EVERYWHERE, Entrance, host_and_port, with_port
from lightning_rft.explorer.launcher import Handle, Launcher, Place
from lightning_rft.explorer.secret import VARIABLE, new_secret, read_secret, write_secret
from lightning_rft.network import address_towards

__all__ = ["DialIn"]

_SECRET = "join-secret"


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
        self.address = address or ("" if self._host in EVERYWHERE else self._host)
        self.silence_s = silence_s
        self._secret: bytes | None = None  # kept, for explorers that dial in again for another call of the trainer
        self._secret_file: Path | None = None
        self._entrance: Entrance | None = None

    @property
    def port(self) -> int:
        """The port that it listens at; 0 before it does if the system chooses one."""
        return self._port

    @override
    def open(self, folder: Path, count: int) -> None:
        self.address = self.address or _own_address()
        given = bool(os.environ.get(VARIABLE))
        self._secret = read_secret() if given else self._secret or new_secret()
        setting = f"DialIn(bind={self.bind!r})"
        with contextlib.ExitStack() as ends:
            entrance = Entrance(self._host, self._port, self._secret, self.silence_s, setting)
            ends.callback(entrance.close)
            if not given:
                self._secret_file = folder.absolute() / _SECRET
                write_secret(self._secret_file, self._secret)
            self._entrance, self._port = entrance, entrance.port
            ends.pop_all()
        print(f"Explorers join by `{self.command}`", flush=True)  # noqa: T201

    @property
    def where(self) -> str:
        """Host and port that explorers dial."""
        return with_port(self.address, self._port)

    @property
    def command(self) -> str:
        """What starts an explorer, on any machine that reaches this one."""
        secret = "" if self._secret_file is None else f" --secret-file {self._secret_file}"
        return f"lightning-rft join {self.where}{secret}"

    @override
    def launch(self, place: Place) -> Handle | None:
        assert self._entrance is not None, "launch before open"
        return self._entrance.admit(place)

    @property
    @override
    def missing(self) -> str:
        refused = f" ({self._entrance.refusal})" if self._entrance is not None and self._entrance.refusal else ""
        return f"for each explorer run `{self.command}`{refused}, or raise the setting"

    @override
    def close(self) -> None:
        entrance, self._entrance = self._entrance, None
        if entrance is not None:
            entrance.close()
        file, self._secret_file = self._secret_file, None
        if file is not None:
            file.unlink(missing_ok=True)


def _own_address() -> str:
    """This machine's address in the direction of other networks; nothing is sent."""
    try:
        return address_towards("192.0.2.1")  # reserved for documentation
    except OSError as error:
        raise ConfigurationError(
            f"this machine's address is not known ({error}): name it by DialIn(address=...)"
        ) from error
