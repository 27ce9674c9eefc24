"""Two machines on one: network namespaces, and a line between them that can be cut, mended and made thin.

Processes in different namespaces reach each other by the line alone. Each has a loopback interface of its own, so that
nothing which listens there is heard by the other.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

__all__ = ["INTERFACE", "Machine", "Machines", "enter", "hide", "two_machines"]

#: The interface of either machine at its end of the line.
INTERFACE = "line0"

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000  # of linux/sched.h
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000  # of linux/mount.h


@dataclass(frozen=True)
class Machine:
    """One of the two; ``name`` is that of its network namespace."""

    name: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """A command that runs on this machine; the process keeps the id with which it was started."""
        return ["ip", "netns", "exec", self.name, *arguments]

    @property
    def variables(self) -> dict[str, str]:
        """What torch's Gloo needs to know where a host's own name leads nowhere."""
        return {"GLOO_SOCKET_IFNAME": INTERFACE}


@dataclass(frozen=True)
class Machines:
    """Both of them; the addresses are the same in every test, since no other namespace sees them."""

    one: Machine = field(default_factory=lambda: Machine(f"rft-{uuid.uuid4().hex[:8]}", "10.77.0.1"))
    two: Machine = field(default_factory=lambda: Machine(f"rft-{uuid.uuid4().hex[:8]}", "10.77.0.2"))

    def create(self) -> None:
        """Makes both, and the line, which some systems do not let even root do."""
        for machine in (self.one, self.two):
            _ip("netns", "add", machine.name)
        _ip(*("link", "add", INTERFACE, "netns", self.one.name, "type", "veth"),
            *("peer", "name", INTERFACE, "netns", self.two.name))  # fmt: skip

    def connect(self) -> None:
        """Gives both their addresses, and plugs the line in."""
        for machine in (self.one, self.two):
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", machine.name, "link", "set", interface, "up")

    def cut(self) -> None:
        """Pulls the plug at the second machine: what is sent from now on arrives nowhere, and no connection ends."""
        _ip("-n", self.two.name, "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        """Puts the plug in again."""
        _ip("-n", self.two.name, "link", "set", INTERFACE, "up")

    def thin(self, rate: str) -> None:
        """Lets only so much through in either direction, such as ``"8mbit"`` a second."""
        for machine in (self.one, self.two):
            shaped = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "200ms")
            _run("tc", "-n", machine.name, "qdisc", "replace", "dev", INTERFACE, *shaped)

    def remove(self) -> None:
        """Removes both, as far as they were made, and the line with them."""
        for machine in (self.one, self.two):
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)


def enter(name: str) -> None:
    """Moves the calling thread, and all that it starts from now on, to the machine of this name."""
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        _system("setns", descriptor, _CLONE_NEWNET)
    finally:
        os.close(descriptor)


def hide(folder: Path) -> None:
    """Gives the calling process an empty folder in place of one, as on a machine that does not share that disk."""
    _system("unshare", _CLONE_NEWNS)
    _system("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
    _system("mount", b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), None)


def two_machines() -> Iterator[Machines]:
    """For a fixture: ``machines = pytest.fixture(two_machines)``. Skips, with the reason, where they cannot be made."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        pytest.skip(f"network namespaces need {' and '.join(missing)} (iproute2)")
    machines = Machines()
    try:
        try:
            machines.create()
        except RuntimeError as error:
            pytest.skip(f"no network namespaces here: {error}")
        machines.connect()
        yield machines
    finally:
        machines.remove()


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _system(name: str, *arguments: object) -> None:
    """A call of the C library that Python has no name for yet."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
