"""The reception of explorers that dial in: a thread at the gate, and those who know the secret and wait for a place."""

from __future__ import annotations

import socket
import threading
from collections import deque
from dataclasses import dataclass

from lightning_rft.authentication import Gate
from lightning_rft.explorer.about import CLAIM_SIZE, About
from lightning_rft.network import keep_alive

__all__ = ["Guest", "Reception"]

_POLL_S = 0.2


@dataclass(frozen=True)
class Guest:
    """An explorer's process that knows the secret and waits for a place."""

    line: socket.socket
    about: About

    @property
    def waits(self) -> bool:
        """Whether it is still there: it has nothing to say yet, so that whatever comes is its end."""
        try:
            self.line.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False


class Reception:
    """Listens at ``server``, which is its own, until it is closed.

    A guest counts as gone ``silence_s`` seconds after it has last answered.
    """

    def __init__(self, server: socket.socket, secret: bytes, silence_s: float) -> None:
        self._gate = Gate(server, secret, CLAIM_SIZE)
        self._silence_s = silence_s
        self._guests: deque[Guest] = deque()
        self._lock = threading.Lock()  # of the guests
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reception", daemon=True)
        self._thread.start()

    def take(self, slot: int) -> Guest | None:
        """The guest that has waited longest for a place, if any; its connection is the caller's from here on."""
        if self._error is not None:
            raise self._error
        with self._lock:
            for guest in [each for each in self._guests if each.about.slot in (None, slot)]:
                self._guests.remove(guest)
                if guest.waits:
                    return guest
                guest.line.close()
        return None

    def close(self) -> None:
        """Listens no more and sends away all who wait; safe to call twice."""
        self._closing.set()
        self._thread.join()  # it waits for nobody longer than it polls
        self._gate.close()
        with self._lock:
            for guest in self._guests:
                guest.line.close()
            self._guests.clear()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._receive()
                self._sweep()
        except BaseException as error:
            self._error = error

    def _receive(self) -> None:
        try:
            claim, line = self._gate.admit(_POLL_S)
        except TimeoutError:
            return
        line.setblocking(False)
        keep_alive(line, self._silence_s)
        with self._lock:
            self._guests.append(Guest(line, About.claimed(claim)))

    def _sweep(self) -> None:
        with self._lock:
            for guest in [each for each in self._guests if not each.waits]:
                self._guests.remove(guest)
                guest.line.close()
