"""The trainer's ranks: rank 0 shares its results with all of them, and an error that ends one ends all.

Rank 0 alone owns explorers and buffer. Where it waits for them, the others wait for it: :meth:`Ranks.agree` is the one
place where they meet. They talk over connections of their own and not over the trainer's process group, since a
connection shows at once that the other end is gone, has no time limit that a long rollout could exceed, and can be
listened to while the main thread is inside a collective.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing.connection import wait
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_rft.channel import Channel, Failure
from lightning_rft.errors import RankError, ScheduleError
from lightning_rft.trainer.rendezvous import SILENCE_S, connect

__all__ = ["SIGTERM_STATUS", "Ranks"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")
_POLL_S = 0.2
_SIGN_OF_LIFE_S = 2.0
_GRACE_S = 4.0  # for a rank to end by itself after another, before it is ended inside a collective
#: Exit status of a process that SIGTERM ended.
SIGTERM_STATUS = 143


@dataclass(frozen=True)
class _Result:
    """From rank 0: the result of :meth:`Ranks.agree` or :meth:`Ranks.scatter`."""

    what: str
    value: Any


@dataclass(frozen=True)
class _Gather:
    """From rank 0: begin to gather, with these arguments."""

    arguments: tuple[Any, ...]


class _Signal(Enum):
    """Messages without contents."""

    NEXT = auto()  # from rank 0: take the next step of what is being gathered
    ALIVE = auto()
    TERMINATED = auto()  # the sender got SIGTERM
    BYE = auto()  # the sender ends normally, and the end of its connection is no failure


class Ranks:
    """One of the trainer's ranks among the others; a single rank needs no connections.

    ``peers`` are the connections: of rank 0 one to every other rank, of the others one to rank 0. ``gather``
    makes an iterator whose steps all ranks take together.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        peers: dict[int, Channel] | None = None,
        gather: Callable[..., Iterator[Any]] = iter,
    ) -> None:
        self.rank = rank
        self.count = count
        self._peers = peers or {}
        self._gather = gather
        self._news = threading.Condition()
        self._inbox: deque[_Result | _Gather | _Signal] = deque()
        self._failure: BaseException | None = None  # of another rank
        self._why = ""  # traceback of the first rank that failed
        self._terminated = False
        self._noticed = False  # whether the main thread is already ending
        self._closing = threading.Event()
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        self._thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        if not self._alone:
            self._thread.start()

    @classmethod
    def meet(cls, trainer: L.Trainer, gather: Callable[..., Iterator[Any]]) -> Ranks:
        """Connects the ranks of a trainer, each of which calls this; raises :class:`DeadlineError` if some do not."""
        if trainer.world_size == 1:
            return cls(gather=gather)
        return cls(trainer.global_rank, trainer.world_size, connect(trainer), gather)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def _alone(self) -> bool:
        return self.count == 1

    def agree(self, what: str, function: Callable[[], _T]) -> _T:
        """Calls a function on rank 0, and returns its result, or raises its error, on every rank.

        Whenever rank 0 gathers meanwhile, the others take part. ``what`` names the call and is the same on all
        ranks, or :class:`ScheduleError` is raised. Raises the error that ended another rank, or :class:`RankError` if
        that rank is gone or its exception cannot be rebuilt here.
        """
        return self.scatter(what, lambda: [function()] * self.count)

    def scatter(self, what: str, function: Callable[[], Sequence[_T]]) -> _T:
        """As :meth:`agree`, but the function returns a value for each rank, and no rank is sent another's."""
        self.check()
        if not self.leads:
            return self._attend(what)
        try:
            results = function()
        except BaseException as error:
            self.fail(error)
            raise
        for rank, channel in list(self._peers.items()):
            self._send_to(channel, _Result(what, results[rank]))
        return results[0]

    def gathered(self, *arguments: Any) -> Iterator[Any]:
        """Yields what all ranks gather together, such as whole weights, on rank 0 inside :meth:`agree`.

        The others take a step when rank 0 does, and drop what comes of it. So it can stop at any step: no rank is left
        in a collective.
        """
        self._send(_Gather(arguments))
        steps = self._gather(*arguments)
        while True:
            self._send(_Signal.NEXT)
            try:
                step = next(steps)
            except StopIteration:
                return
            yield step
            del step  # it may be large

    def check(self) -> None:
        """Raises the error that ended another rank, or ``SIGTERMException`` if any rank got SIGTERM."""
        with self._news:
            if self._failure is not None:
                raise self._failure
        if self._terminated:
            error = SIGTERMException()
            error.code = SIGTERM_STATUS
            raise error

    def fail(self, error: BaseException) -> None:
        """Sends the other ranks the error that ends this one; only the first counts."""
        if self._noticed or self._alone:
            return
        self._noticed = True
        self._send(Failure.of(error))
        if isinstance(error, RuntimeError) and error is not self._failure:
            # perhaps a collective that broke off: the rank that left it sends the reason
            with self._news:
                self._news.wait_for(lambda: self._why, _SIGN_OF_LIFE_S)
            if self._why:
                _log.error(self._why)

    def mind_sigterm(self) -> None:
        """Has SIGTERM to any rank end all of them, at the next :meth:`agree`.

        Lightning's handler would begin a collective at once, and in the middle of another one that never returns.
        """
        if not self._alone and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def close(self) -> None:
        """Leaves the group; safe to call twice."""
        if self._closing.is_set() or self._alone:
            return
        self._noticed = True
        self._send(_Signal.BYE)
        self._closing.set()
        self._thread.join(_GRACE_S)  # it may be in the middle of a message that never ends
        for channel in list(self._peers.values()):
            channel.close()

    def _attend(self, what: str) -> Any:
        """Waits for rank 0's result, and takes part in what it gathers."""
        steps: Iterator[Any] = iter(())
        while True:
            with self._news:
                self._news.wait_for(lambda: self._inbox or self._failure or self._terminated, _POLL_S)
                message = self._inbox.popleft() if self._inbox else None
            if isinstance(message, _Gather):
                steps = self._gather(*message.arguments)
            elif message is _Signal.NEXT:
                next(steps, None)
            elif isinstance(message, _Result):
                if message.what != what:
                    raise ScheduleError(
                        f"rank 0 has reached {message.what}, but rank {self.rank} has reached {what}: the ranks run "
                        "different code, or a callback acts only on some of them"
                    )
                return message.value
            else:
                self.check()
                if not self._peers:
                    raise ScheduleError(
                        f"rank {self.rank} waits for {what}, but rank 0 has ended: the ranks run different code"
                    )

    def _send(self, message: Any) -> None:
        for channel in list(self._peers.values()):
            self._send_to(channel, message)

    @staticmethod
    def _send_to(channel: Channel, message: Any) -> None:
        try:
            channel.send(message)
        except OSError:
            # It is gone, or has read nothing for long and has half of a message: either way the listening threads of
            # both ends are to find the end of the line, and nothing that follows that half.
            with contextlib.suppress(OSError), _line(channel) as line:
                line.shutdown(socket.SHUT_RDWR)

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        # takes no lock, since the main thread may hold it
        self._terminated = True

    def _listen(self) -> None:
        """Receives from the others and sends them signs of life."""
        signed = 0.0  # when it sent the last sign of life
        passed_on = False
        while not self._closing.is_set():
            now = time.monotonic()
            if now - signed > _SIGN_OF_LIFE_S:
                signed = now
                self._send(_Signal.ALIVE)
            if self._terminated and not passed_on:
                passed_on = True
                self._send(_Signal.TERMINATED)
            channels: list[Any] = list(self._peers.values())
            ready: list[Any] = wait(channels, _POLL_S)
            for rank, channel in list(self._peers.items()):
                if channel in ready:
                    self._receive(rank, channel)
                elif now - self._heard[rank] > SILENCE_S:
                    self._lost(rank, RankError(f"rank {rank} has given no sign of life for {SILENCE_S:.0f} seconds"))

    def _receive(self, rank: int, channel: Channel) -> None:
        try:
            message = channel.receive(0)
        except (EOFError, OSError):
            why = "it was killed, or the line to it broke; see its output"
            self._lost(rank, RankError(f"rank {rank} is gone without an error: {why}"))
            return
        self._heard[rank] = time.monotonic()
        if isinstance(message, Failure):
            self._why = self._why or f"rank {rank} failed:\n{message.text}"
            self._lost(rank, message.unpack(f"rank {rank}", RankError))
        elif message is _Signal.TERMINATED:
            self._terminated = True
        elif message is _Signal.BYE:
            self._peers.pop(rank).close()
        elif message is not _Signal.ALIVE:
            with self._news:
                self._inbox.append(message)
                self._news.notify_all()

    def _lost(self, rank: int, error: BaseException) -> None:
        self._peers.pop(rank).close()
        with self._news:
            self._failure = self._failure or error
            self._news.notify_all()
        threading.Thread(target=self._end_if_stuck, args=(rank, error), name="ranks-end", daemon=True).start()

    def _end_if_stuck(self, rank: int, error: BaseException) -> None:
        """Ends this process if its main thread stays inside a collective with the lost rank."""
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline:
            if self._noticed or self._closing.wait(_POLL_S):
                return
        sys.stderr.write(f"rank {self.rank} ends because it waits for rank {rank}: {error}\n{self._why}\n")
        sys.stderr.flush()
        os._exit(1)  # no hook can run: the main thread is in a collective that will not return


def _line(channel: Channel) -> socket.socket:
    """A channel's connection, under a descriptor of its own."""
    return socket.socket(fileno=os.dup(channel.fileno()))
