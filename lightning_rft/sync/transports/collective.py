"""Weight transport by collective: one broadcast group over rank 0 and every explorer."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from typing_extensions import override

from lightning_rft.errors import ConfigurationError, LinkError, RFTError, TransportError
from lightning_rft.sync.transports.feed import Feed
from lightning_rft.sync.transports.gloo import GlooSender
from lightning_rft.sync.transports.ipc import IPCSender
from lightning_rft.sync.transports.nccl import NCCLSender
from lightning_rft.sync.transports.transport import Explorers, Sender, Transport, Weights

__all__ = ["CollectiveTransport"]

_WATCH_S = 0.05
_ATTEMPTS = 3
_SETTLE_S = 5.0  # for the members that are left to notice that their group has broken off
_LATE = "a weight push passed its deadline: raise CollectiveTransport(timeout_s=...)"


class CollectiveTransport(Transport):
    """Broadcasts the weights from the trainer to every explorer.

    Gloo is ours and runs everywhere. NCCL is vLLM's own weight transfer and needs the trainer and every vLLM engine on
    GPUs of their own. CUDA IPC is for explorers on the trainer's GPUs, whatever their engine: they read the weights
    where the trainer puts them, a bucket at a time. Neither has run on a GPU yet. The group is made at the first push
    and again when the explorers change; the operating system chooses its port. When a member dies or does not come in
    time, the push is repeated with the others.

    Args:
        backend: ``"gloo"``, ``"nccl"``, ``"ipc"``, or ``"auto"``: IPC where all explorers share the trainer's GPUs,
            NCCL where both sides can use it, else Gloo.
        timeout_s: Seconds that one push may take, the making of the group included. Explorers that hang are ended then;
            if all are well, the run is, since the next push would be as late.
        bucket_mib: MiB per broadcast, more where a tensor is larger; by IPC, MiB that a push takes of each GPU.
        background: How :class:`FullyAsynchronous` and :class:`MultiExplorerAsynchronous` push. ``"snapshot"``: training
            waits for a copy of the weights in the engines' dtype, in the CPU's memory with Gloo and else on its GPU; a
            thread sends it to one explorer after another. ``"blocking"``: training waits until explorers have
            the weights, and nothing is copied; it goes with ``in_flight=True``, since an explorer that finishes its
            groups first has to wait for training to end a step.

    Raises:
        ConfigurationError: ``backend`` or ``background`` is none of these, or there is nothing to make a bucket of.
    """

    def __init__(
        self,
        backend: Literal["auto", "nccl", "ipc", "gloo"] = "auto",
        timeout_s: float = 120.0,
        bucket_mib: int = 64,
        background: Literal["snapshot", "blocking"] = "snapshot",
    ) -> None:
        if backend not in ("auto", "nccl", "ipc", "gloo"):
            raise ConfigurationError(f"CollectiveTransport(backend={backend!r}): use 'auto', 'nccl', 'ipc' or 'gloo'")
        if bucket_mib < 1:
            raise ConfigurationError(f"CollectiveTransport(bucket_mib={bucket_mib}) must be at least 1")
        if background not in ("snapshot", "blocking"):
            raise ConfigurationError(f"CollectiveTransport(background={background!r}): use 'snapshot' or 'blocking'")
        self.backend = backend
        self.timeout_s = timeout_s
        self.bucket_mib = bucket_mib
        self.blocking = background == "blocking"
        self.one_by_one = not self.blocking  # in a group of two each, a slow explorer holds up no other
        self._stragglers: list[threading.Thread] = []  # still in a push that broke off
        self._senders: dict[tuple[tuple[int, int], ...], Sender] = {}  # by members, as in Explorers.members()

    @override
    def check(self, *, nccl: bool, apart: str) -> None:
        if self.backend == "nccl" and not nccl:
            raise ConfigurationError(
                "CollectiveTransport(backend='nccl') needs the trainer and vLLM engines on GPUs of their own: use "
                "backend='auto'"
            )
        if self.backend == "ipc" and apart:
            raise ConfigurationError(
                f"CollectiveTransport(backend='ipc') needs explorers on the trainer's own GPUs, but {apart}: use "
                "backend='auto', or ExplorerPool(placement='shared') on a machine with GPUs"
            )

    @override
    def snapshot(self, weights: Weights, explorers: Explorers) -> Weights:
        return weights.snapshot(on_cpu=self._way(weights.device, explorers) == "gloo")

    @override
    def push(self, weights: Weights, version: int, explorers: Explorers, to: Sequence[int] | None = None) -> None:
        todo = set(explorers.members() if to is None else to)
        left = _ATTEMPTS
        while members := {explorer: size for explorer, size in explorers.members().items() if explorer in todo}:
            deadline = time.monotonic() + self.timeout_s
            sender = self._sender(members, weights.device, explorers)
            try:
                if not sender.joined:
                    self._watched(partial(sender.join, explorers, members), members, explorers, deadline)
                for explorer in members:
                    explorers.load(explorer, weights.manifest, version)
                feed = Feed(sender.begin(weights))
                self._watched(partial(sender.send, feed, weights.manifest), members, explorers, deadline, feed)
                if not explorers.wait_loaded(version, list(members), deadline - time.monotonic()):
                    break
                raise LinkError(_LATE)  # though all is sent: some of it may lie in the buffers of a network
            except LinkError as error:
                late = time.monotonic() > deadline
                absent = sender.absent()
                self._leave(sender)  # the others cannot use a group in which one member broke off
                self.end_late(absent, "join the weight transport", explorers)
                stuck = explorers.settle(list(members), _SETTLE_S)
                if late:
                    self.end_late(stuck, f"load version {version}", explorers)
                else:
                    explorers.end(stuck, "was stuck in a load that broke off")
                if members.keys() <= explorers.members().keys():  # no death explains it
                    if late:  # as it would be again; whichever end noticed first says how
                        raise LinkError(_LATE) from error
                    left -= 1
                    if not left:
                        raise TransportError(f"a weight push broke off {_ATTEMPTS} times: {error}") from error
            except BaseException:
                self.close()
                raise

    @override
    def close(self) -> None:
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()
        deadline = time.monotonic() + _SETTLE_S
        for thread in self._stragglers:  # one that came to its end while the interpreter does would abort the process
            thread.join(max(0.0, deadline - time.monotonic()))
        self._stragglers.clear()

    def _watched(
        self,
        function: Callable[[], None],
        members: Mapping[int, int],
        explorers: Explorers,
        deadline: float,
        feed: Feed | None = None,
    ) -> None:
        """Runs a blocking collective on a thread, which ``feed`` is for; fills that meanwhile.

        Raises :class:`LinkError` if a member dies or the deadline passes; :meth:`close` then waits for the thread.
        """
        errors: list[BaseException] = []

        def run() -> None:
            try:
                function()
            except BaseException as error:
                # These frames hold the group: while they do, it keeps its connections, and a member that waits for the
                # rest of this push would not learn that it broke off.
                traceback.clear_frames(error.__traceback__)
                errors.append(error)

        thread = threading.Thread(target=run, name="weight-push", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                if feed is None or not feed.fill(_WATCH_S):
                    thread.join(_WATCH_S)
                explorers.raise_failures()
                if gone := members.keys() - explorers.members().keys():
                    raise LinkError(f"explorers {sorted(gone)} are gone")
                if time.monotonic() > deadline:
                    raise LinkError(_LATE)
        finally:
            if feed is not None:
                feed.end()
            self._stragglers = [other for other in (*self._stragglers, thread) if other.is_alive()]
        for error in errors:
            if isinstance(error, (RuntimeError, OSError)) and not isinstance(error, RFTError):
                raise LinkError(f"a weight push broke off: {error}") from error
            raise error

    def _leave(self, sender: Sender) -> None:
        sender.close()
        self._senders = {key: other for key, other in self._senders.items() if other is not sender}

    def _sender(self, members: dict[int, int], device: torch.device, explorers: Explorers) -> Sender:
        """The group of exactly these explorers; closes other groups that share one with it or have lost one."""
        key = tuple(members.items())
        if key not in self._senders:
            alive = explorers.members().keys()
            for other in list(self._senders):
                theirs = dict(other).keys()
                if theirs & members.keys() or not theirs <= alive:
                    self._senders.pop(other).close()
            self._senders[key] = self._make_sender(device, explorers)
        return self._senders[key]

    def _make_sender(self, device: torch.device, explorers: Explorers) -> Sender:
        way, bucket_bytes = self._way(device, explorers), self.bucket_mib << 20
        if way == "nccl":
            return NCCLSender(device, self.timeout_s, bucket_bytes)
        if way == "ipc":
            return IPCSender(device, self.timeout_s, bucket_bytes)
        return GlooSender(self.timeout_s, bucket_bytes)

    def _way(self, device: torch.device, explorers: Explorers) -> str:
        """The backend that carries weights from a device."""
        on_gpu = device.type == "cuda"
        nccl, ipc = on_gpu and explorers.nccl, on_gpu and explorers.ipc
        self.check(nccl=nccl, apart="" if ipc else "an engine is not")
        if self.backend != "auto":
            return self.backend
        return "nccl" if nccl else "ipc" if ipc else "gloo"
