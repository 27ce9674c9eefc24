"""The reception of explorers that dial in: a listening socket, and a thread that lets in who knows the run's secret."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from lightning_rft.explorer.handshake import GREETING_SIZE, REFUSED, About, Challenge, keep_alive

__all__ = ["Guest", "Reception"]

_log = logging.getLogger(__name__)

_POLL_S = 0.2
_GREETING_S = 10.0
_MOST_STRANGERS = 32


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


@dataclass
class _Stranger:
    """A connection that has proved nothing yet."""

    line: socket.socket
    challenge: Challenge
    deadline: float
    said: bytes = b""


class Reception:
    """Listens at ``server``, which is its own, until it is closed.

    One thread reads from all strangers without waiting for any, and from each no more than a greeting has. Of too many
    at a time it drops the oldest, so that those who say nothing keep nobody out. A guest counts as gone ``silence_s``
    seconds after it has last answered.
    """

    def __init__(self, server: socket.socket, secret: bytes, silence_s: float) -> None:
        self._server = server
        self._secret = secret
        self._silence_s = silence_s
        self._strangers: dict[int, _Stranger] = {}  # by file descriptor, the oldest first
        self._guests: deque[Guest] = deque()
        self._lock = threading.Lock()  # of the guests
        self._warned = False
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._selector = selectors.DefaultSelector()
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="reception", daemon=True)
        self._thread.start()

    def take(self) -> Guest | None:
        """The guest that has waited longest, if there is one; its connection is the caller's from here on."""
        if self._error is not None:
            raise self._error
        with self._lock:
            while self._guests:
                guest = self._guests.popleft()
                if guest.waits:
                    return guest
                guest.line.close()
        return None

    def close(self) -> None:
        """Listens no more and sends away all who wait; safe to call twice."""
        self._closing.set()
        self._thread.join()  # it never waits for anyone
        for line in (self._server, *(stranger.line for stranger in self._strangers.values())):
            line.close()
        self._strangers.clear()
        self._selector.close()
        with self._lock:
            for guest in self._guests:
                guest.line.close()
            self._guests.clear()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                for key, _ in self._selector.select(_POLL_S):
                    if key.fileobj is self._server:
                        self._accept()
                    elif key.fd in self._strangers:  # else it was dropped for one that has just come
                        self._listen(self._strangers[key.fd])
                self._sweep(time.monotonic())
        except BaseException as error:
            self._error = error

    def _accept(self) -> None:
        try:
            line, _ = self._server.accept()
        except OSError:  # it hung up at once, or there are too many open files
            self._closing.wait(_POLL_S)
            return
        line.setblocking(False)
        stranger = _Stranger(line, Challenge(self._secret), time.monotonic() + _GREETING_S)
        self._strangers[line.fileno()] = stranger
        self._selector.register(line, selectors.EVENT_READ)
        self._say(stranger, stranger.challenge.opening)
        if len(self._strangers) > _MOST_STRANGERS:
            self._drop(next(iter(self._strangers.values())))

    def _listen(self, stranger: _Stranger) -> None:
        try:
            part = stranger.line.recv(GREETING_SIZE - len(stranger.said))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        stranger.said += part
        if not part:
            self._drop(stranger)
        elif len(stranger.said) == GREETING_SIZE:
            self._judge(stranger)

    def _judge(self, stranger: _Stranger) -> None:
        answer = stranger.challenge.answer(stranger.said)
        if answer is None:
            if not self._warned:  # once, since who has no secret decides how often this happens
                self._warned = True
                _log.warning("refused %s, which does not know the secret of this run", _peer(stranger.line))
            self._say(stranger, REFUSED)
            self._drop(stranger)
            return
        proof, about = answer
        if self._say(stranger, proof):
            self._forget(stranger)
            keep_alive(stranger.line, self._silence_s)
            with self._lock:
                self._guests.append(Guest(stranger.line, about))

    def _say(self, stranger: _Stranger, said: bytes) -> bool:
        """Sends what fits the buffer of any new connection; drops a stranger for whom it does not."""
        with contextlib.suppress(OSError):
            if stranger.line.send(said) == len(said):
                return True
        self._drop(stranger)
        return False

    def _sweep(self, now: float) -> None:
        for stranger in [each for each in self._strangers.values() if each.deadline < now]:
            self._drop(stranger)
        with self._lock:
            for guest in [each for each in self._guests if not each.waits]:
                self._guests.remove(guest)
                guest.line.close()

    def _drop(self, stranger: _Stranger) -> None:
        if stranger.line.fileno() in self._strangers:
            self._forget(stranger)
            stranger.line.close()

    def _forget(self, stranger: _Stranger) -> None:
        del self._strangers[stranger.line.fileno()]
        self._selector.unregister(stranger.line)


def _peer(line: socket.socket) -> Any:
    try:
        return line.getpeername()[0]
    except OSError:  # it has just hung up
        return "a stranger"
