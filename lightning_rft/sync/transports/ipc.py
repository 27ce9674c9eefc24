"""Weight transport within a GPU that trainer and explorer share (CUDA IPC): one bucket, which both have open.

Not run on a GPU yet. A push makes the buckets, one on each GPU, and leaves none, since the memory is the other side's
in the next turn::

    trainer    handle    fill, filled    .............    fill, filled    ..............
    explorer   open      ............    copy, taken      ............    copy, close, closed

All that needs a GPU are the calls of ``torch.cuda`` for devices and streams, and ``gpu_memory.py``. vLLM's own transfer
by IPC takes a request for every bucket, and refuses a tensor that is larger than one; here, an engine gets tensors as
from any other transport.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from typing_extensions import override

from lightning_rft.authentication import Gate, prove
from lightning_rft.errors import AuthenticationError, ConfigurationError, LinkError, TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.network import LOOPBACK, listen
from lightning_rft.sync.transports.gpu_memory import gpu_name, open_handle, share, take_back
from lightning_rft.sync.transports.line import Line, heard
from lightning_rft.sync.transports.meeting import link_errors
from lightning_rft.sync.transports.packing import Packing
from lightning_rft.sync.transports.pieces import Piece, pieces
from lightning_rft.sync.transports.transport import Explorers, Named, Sender, Weights, under_all_names

__all__ = ["IPCLink", "IPCReceiver", "IPCSender"]

_FILLED, _TAKEN, _CLOSED = b"filled", b"taken", b"closed"
_CLAIM = struct.Struct(">I64s")  # a member's rank, and the name of its GPU
_POLL_S = 0.05


@dataclass(eq=False)
class _Member:
    """A process of an explorer's that holds weights, as the trainer sees it."""

    explorer: int
    line: Line
    device: torch.device  #: That of its weights, as this process calls it.
    handle: bytes = b""  #: Of the bucket, until it has closed that.


class IPCSender(Sender):
    """The trainer's end; ``device`` holds the weights, and the buckets of other devices are copies of the one on it."""

    def __init__(self, device: torch.device, timeout_s: float, bucket_bytes: int) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._expected: list[int] = []  # the explorer of each member, by rank
        self._members: dict[int, _Member] = {}  # by rank, those that have come
        self._packing = Packing(device)
        self._lock = threading.Lock()  # of the two that follow
        self._closed = False
        self._busy = False  # whether a thread uses the lines, which it will then close

    @property
    @override
    def joined(self) -> bool:
        return bool(self._expected) and not self.absent()

    @override
    def absent(self) -> list[int]:
        came = set(self._members)
        return sorted({explorer for rank, explorer in enumerate(self._expected) if rank not in came})

    @override
    def join(self, explorers: Explorers, members: Mapping[int, int]) -> None:
        devices = {gpu_name(index): torch.device("cuda", index) for index in range(torch.cuda.device_count())}
        self._expected = [explorer for explorer, size in members.items() for _ in range(size)]
        secret, server = secrets.token_bytes(32), listen(LOOPBACK, len(self._expected))
        port = server.getsockname()[1]
        with Gate(server, secret, _CLAIM.size) as gate, self._at_work():
            for explorer in members:
                rank = self._expected.index(explorer)
                explorers.connect(explorer, IPCLink(port, rank, self._timeout_s, self._bucket_bytes, secret))
            while not self._closed and not self.joined:
                with contextlib.suppress(TimeoutError):
                    self._welcome(*gate.admit(_POLL_S), devices)

    def _welcome(self, claim: bytes, connection: socket.socket, devices: Mapping[str, torch.device]) -> None:
        rank, name = _CLAIM.unpack(claim)
        explorer, gpu = self._expected[rank], name.rstrip(b"\0").decode()
        if gpu not in devices:
            connection.close()
            raise ConfigurationError(
                f"explorer {explorer} computes on GPU {gpu}, which the trainer does not see: set "
                "CollectiveTransport(backend='gloo')"
            )
        before = self._members.get(rank)
        self._members[rank] = _Member(explorer, Line(connection), devices[gpu])
        if before is not None:  # its first connection broke before it had the answer
            before.line.close()

    @override
    def begin(self, weights: Weights) -> Iterator[Named]:
        return self._packing.begin(weights)

    @override
    def send(self, tensors: Iterable[Named], manifest: Sequence[TensorInfo]) -> None:
        cut = pieces(manifest, self._bucket_bytes)
        if not cut:
            return
        size = max(1, *(held[-1].end for held in cut))
        with self._at_work(), self._packing.entered():
            buckets: dict[torch.device, torch.Tensor] = {}
            try:
                for device in (self._device, *(member.device for member in self._members.values())):
                    if device not in buckets:
                        buckets[device] = torch.empty(size, dtype=torch.uint8, device=device)
                for member in self._members.values():
                    member.handle = share(buckets[member.device])
                    member.line.say(member.handle)
                self._pass_on(iter(tensors), cut, buckets)
            finally:
                self._wait_closed()
                buckets.clear()
                torch.cuda.ipc_collect()  # also what an earlier push had to leave

    def _pass_on(
        self, coming: Iterator[Named], cut: Sequence[Sequence[Piece]], buckets: Mapping[torch.device, torch.Tensor]
    ) -> None:
        """Fills the buckets again and again, each time when everyone has taken what was in it."""
        bucket = flat = buckets[self._device]
        others = [other for other in buckets.values() if other is not bucket]
        for held in cut:
            for piece in held:
                if piece.first:
                    flat = self._flat(piece.info, *next(coming, ("nothing", bucket)))
                piece.view(bucket).copy_(flat[piece.start : piece.stop])
            if held[-1].last:
                flat = bucket  # no more tensors than of one bucket are kept for it
            for other in others:
                other[: held[-1].end].copy_(bucket[: held[-1].end])
            self._packing.finish()
            for member in self._members.values():
                member.line.say(_FILLED)
            self._hear(_CLOSED if held is cut[-1] else _TAKEN)

    def _flat(self, info: TensorInfo, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The elements of a tensor, which was made on another stream."""
        if name != info.name:
            raise TransportError(f"{info.name} was announced, but {name} was to be sent")
        self._packing.takes(tensor)
        return tensor.reshape(-1)

    def _hear(self, word: bytes) -> None:
        """Waits until every member has said a word."""
        deadline = time.monotonic() + self._timeout_s
        waiting = {member.line: member for member in self._members.values()}
        while waiting:
            if self._closed:
                raise LinkError("the push was given up")
            if time.monotonic() > deadline:
                raise LinkError(f"explorers {_explorers(waiting.values())} took no bucket in {self._timeout_s:g} s")
            for line in heard(waiting, _POLL_S):
                member = waiting.pop(line)
                said = line.hear()
                if said == _CLOSED:
                    member.handle = b""
                if said != word:
                    raise LinkError(f"explorer {member.explorer} broke off a push")

    def _wait_closed(self) -> None:
        """Waits until nobody has a bucket open, which would have to be kept: after a push that broke off, somebody may.

        An explorer that is stuck will have been ended by then.
        """
        waiting = {member.line: member for member in self._members.values() if member.handle}
        for line in waiting:
            line.hang_up()
        deadline = time.monotonic() + self._timeout_s
        while waiting and time.monotonic() < deadline:
            for line in heard(waiting, _POLL_S):
                member = waiting[line]
                try:
                    closed = line.hear() == _CLOSED
                except OSError:  # it is gone, or has never opened it
                    take_back(member.handle)
                    closed = True
                if closed:
                    member.handle = b""
                    del waiting[line]

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Keeps lines open if the sender is closed meanwhile, and closes them then."""
        with self._lock:
            self._busy = True
        try:
            yield
        finally:
            with self._lock:
                self._busy = False
            if self._closed:
                self.close()

    @override
    def close(self) -> None:
        with self._lock:
            self._closed, busy = True, self._busy
        for member in list(self._members.values()):
            if busy:
                member.line.hang_up()
            else:
                member.line.close()


def _explorers(members: Iterable[_Member]) -> list[int]:
    return sorted({member.explorer for member in members})


@dataclass(frozen=True)
class IPCLink:
    """An invitation to open the trainer's buckets."""

    port: int
    rank: int  #: Of the engine's first weight-holding process; the others follow.
    timeout_s: float  #: Of the meeting and of each push.
    bucket_bytes: int
    secret: bytes = field(repr=False)

    def open(self, member: int) -> IPCReceiver:
        """Comes to the trainer, for a process whose weights are on the thread's current GPU."""
        return IPCReceiver(self, member)


class IPCReceiver:
    """An explorer's end."""

    def __init__(self, link: IPCLink, member: int) -> None:
        self._timeout_s = link.timeout_s
        self._bucket_bytes = link.bucket_bytes
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._bucket: torch.Tensor | None = None  # while it is open
        self._line: Line | None = None
        claim = _CLAIM.pack(link.rank + member, gpu_name(self._device.index).encode())
        with link_errors(), contextlib.ExitStack() as unless_it_works:
            connection = socket.create_connection((LOOPBACK, link.port), link.timeout_s)
            unless_it_works.callback(connection.close)
            try:
                prove(connection, link.secret, claim, link.timeout_s)
            except AuthenticationError as error:  # of a push that was given up, at whose port another one listens
                raise LinkError(f"the weight transport broke off: {error}") from error
            unless_it_works.pop_all()
            self._line = Line(connection)

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields copies of the tensors of one push, since the next bucket comes while an engine still has them."""
        line = self._line
        if line is None:
            raise TransportError("weights were announced on a link that was closed")
        yield from under_all_names(manifest, self._arriving(line, pieces(manifest, self._bucket_bytes)))

    def _arriving(self, line: Line, cut: Sequence[Sequence[Piece]]) -> Iterator[torch.Tensor]:
        """Yields all tensors but aliases, in order; leaves the transport if they do not all come, or are not wanted."""
        deadline = time.monotonic() + self._timeout_s
        begun: list[torch.Tensor] = []  # of which more is to come
        complete = not cut
        try:
            for held in cut:
                with link_errors():
                    if self._bucket is None:
                        self._open(line.hear(deadline - time.monotonic()))
                    line.hear(deadline - time.monotonic())
                whole = self._copied(held, begun)
                begun = [] if held[-1].last else [whole.pop()]
                complete = held is cut[-1]
                if complete:
                    self._close_bucket()
                else:
                    with link_errors():
                        line.say(_TAKEN)
                yield from whole
        finally:
            if not complete:
                self.close()

    def _open(self, handle: bytes) -> None:
        with torch.cuda.device(self._device):
            self._bucket = open_handle(handle, self._device)

    def _copied(self, held: Sequence[Piece], begun: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies what the bucket holds: tensors, the first of which was ``begun``; the last may be incomplete."""
        bucket, tensors = self._bucket, list(begun)
        assert bucket is not None, "a bucket that was not opened"
        with torch.cuda.device(self._device):
            for piece in held:
                if piece.first:
                    tensors.append(bucket.new_empty(piece.info.shape, dtype=piece.dtype))
                tensors[-1].view(-1)[piece.start : piece.stop].copy_(piece.view(bucket))
            torch.cuda.current_stream(self._device).synchronize()  # the trainer writes over it next
        return tensors

    def _close_bucket(self) -> None:
        """Closes the bucket if it is open, and tells the trainer, which may be gone."""
        if self._bucket is None:
            return
        with torch.cuda.device(self._device):
            self._bucket = None
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.say(_CLOSED)

    def close(self) -> None:
        """Leaves the transport."""
        self._close_bucket()
        line, self._line = self._line, None
        if line is not None:
            line.close()
