"""What an explorer says to a rank 0 that does not read."""

from __future__ import annotations

import socket
import threading

import pytest

from lightning_rft.channel import Channel
from lightning_rft.explorer.worker.outbox import Outbox

LARGE = 3_000_000  # bytes, more than any line holds by itself


def test_messages_wait_as_long_as_nobody_reads_and_arrive_whole() -> None:
    ours, theirs = socket.socketpair()
    timeout = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
    reader, channel = Channel(ours.detach()), Channel(theirs.detach(), patient=True)
    with socket.socket(fileno=channel.fileno()) as line:
        assert line.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == timeout == bytes(16)
        line.detach()
    failures: list[Exception] = []
    outbox = Outbox(channel, failures.append)
    for index in range(4):
        outbox.send(bytes([index]) * LARGE)  # returns at once, although nothing is read yet
    closing = threading.Thread(target=outbox.close)
    closing.start()
    for index in range(4):
        assert closing.is_alive()
        assert reader.receive(30) == bytes([index]) * LARGE
    closing.join(30)
    assert not closing.is_alive() and not failures
    channel.close()
    reader.close()


def test_what_cannot_be_sent_is_told() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs.detach(), patient=True)
    ours.close()
    failures: list[Exception] = []
    outbox = Outbox(channel, failures.append)
    outbox.send("hello")
    outbox.close()
    with pytest.raises(BrokenPipeError):
        raise failures[0]
    channel.close()
