"""A connection between the two halves of a push, which say in turn what they have done."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterable

__all__ = ["Line", "heard"]

_SIZE = struct.Struct(">I")
_WORD_S = 5.0  # from the beginning of a word to its end; it is a few hundred bytes and sent at once


class Line:
    """Words over a socket, which is its own."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_WORD_S)
        self._connection = connection

    def fileno(self) -> int:
        """The file descriptor, for ``select``."""
        return self._connection.fileno()

    def say(self, word: bytes) -> None:
        """Sends a word; raises ``OSError`` if nobody is there."""
        self._connection.sendall(_SIZE.pack(len(word)) + word)

    def hear(self, timeout_s: float = 0.0) -> bytes:
        """The next word; ``ConnectionError`` if the other end has hung up, ``TimeoutError`` if nothing comes."""
        if not heard([self], timeout_s):
            raise TimeoutError(f"nothing came within {timeout_s:.3g} s")
        return self._read(*_SIZE.unpack(self._read(_SIZE.size)))

    def hang_up(self) -> None:
        """Says no more; the other end, which hears that, may still say a last word."""
        try:
            self._connection.shutdown(socket.SHUT_WR)
        except OSError:  # it has hung up, too
            return

    def close(self) -> None:
        """Closes this end; safe to call twice."""
        self._connection.close()

    def _read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            more = self._connection.recv(size - len(found))
            if not more:
                raise ConnectionResetError("the other end hung up")
            found += more
        return found


def heard(lines: Iterable[Line], timeout_s: float) -> list[Line]:
    """Those on which something has come, or the other end has hung up; waits for the first at most so long."""
    poll = select.poll()  # unlike select, of any number of descriptors
    by_number = {line.fileno(): line for line in lines}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(max(0.0, timeout_s) * 1000)]
