"""Weights by collective: one broadcast group over rank 0 and every explorer, bucket by bucket."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from lightning_rft.errors import ConfigurationError, LinkError, RFTError, TransportError
from lightning_rft.sync.transports.gloo import GlooSender
from lightning_rft.sync.transports.nccl import NCCLSender
from lightning_rft.sync.transports.transport import Explorers, Sender, Transport, Weights, announce

__all__ = ["CollectiveTransport"]

_WATCH_S = 0.05
_ATTEMPTS = 3
_SETTLE_S = 5.0  # for those that are left to notice that their group is no more
_SETTING = "CollectiveTransport(timeout_s=...)"


class CollectiveTransport(Transport):
    """Broadcasts the weights from the trainer to every explorer.

    Gloo is ours and runs everywhere; NCCL is vLLM's own weight transfer (see
    :mod:`lightning_rft.sync.transports.nccl`) and needs the trainer and every vLLM engine on GPUs of their own. The
    group is made at the first push and made again when the explorers change; its port is chosen by the operating
    system. When a member dies or does not come in time, the push is repeated with the others.

    Args:
        backend: ``"gloo"``, ``"nccl"``, or ``"auto"`` for NCCL where both sides can, else Gloo.
        timeout_s: Deadline of one push, the making of the group included.
        bucket_mib: MiB that travel at a time.

    Raises:
        ConfigurationError: ``backend`` is none of the three.
    """

    one_by_one = True  # a group of two for each: whoever is slow holds up no one

    def __init__(
        self, backend: Literal["auto", "nccl", "gloo"] = "auto", timeout_s: float = 120.0, bucket_mib: int = 64
    ) -> None:
        if backend not in ("auto", "nccl", "gloo"):
            raise ConfigurationError(f"CollectiveTransport(backend={backend!r}): use 'auto', 'nccl' or 'gloo'")
        self.backend = backend
        self.timeout_s = timeout_s
        self.bucket_mib = bucket_mib
        self._senders: dict[tuple[int, ...], tuple[dict[int, int], Sender]] = {}

    def push(self, weights: Weights, version: int, explorers: Explorers, to: Sequence[int] | None = None) -> None:
        """Broadcasts ``version``; see :meth:`Transport.push`."""
        tensors = [(name, tensor.detach()) for name, tensor in weights]
        manifest = announce(tensors, explorers.dtype)
        todo = set(explorers.members() if to is None else to)
        left = _ATTEMPTS
        while members := {explorer: size for explorer, size in explorers.members().items() if explorer in todo}:
            deadline = time.monotonic() + self.timeout_s
            sender = self._sender(members, tensors, explorers)
            try:
                if not sender.joined:
                    _watched(lambda: sender.join(explorers, members), members, explorers, deadline)  # noqa: B023
                for explorer in members:
                    explorers.load(explorer, manifest, version)
                _watched(lambda: sender.send(tensors, manifest), members, explorers, deadline)  # noqa: B023
                explorers.wait_loaded(version, list(members), deadline - time.monotonic(), _SETTING)
                break
            except LinkError as error:
                absent = sender.absent()
                self.close()  # a group in which one member broke off is of no use to the others
                explorers.end(absent, f"did not join the weight transport in time: raise {_SETTING}, or see its log")
                explorers.settle(list(members), _SETTLE_S)
                if members.keys() <= explorers.members().keys():  # no death explains it
                    left -= 1
                    if not left:
                        raise TransportError(f"a weight push broke off {_ATTEMPTS} times: {error}") from error
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Leaves every group."""
        for _, sender in self._senders.values():
            sender.close()
        self._senders.clear()

    def _sender(self, members: dict[int, int], tensors: Weights, explorers: Explorers) -> Sender:
        """The group of these explorers; an explorer that was in another one has left that."""
        key = tuple(members)
        known, sender = self._senders.get(key, ({}, None))
        if sender is None or known != members:
            alive = explorers.members().keys()
            for other in [other for other in self._senders if set(other) & set(key) or not set(other) <= alive]:
                self._senders.pop(other)[1].close()
            sender = self._make_sender(tensors, explorers)
            self._senders[key] = dict(members), sender
        return sender

    def _make_sender(self, tensors: Weights, explorers: Explorers) -> Sender:
        on_gpu = all(tensor.is_cuda for _, tensor in tensors)
        if self.backend == "nccl" and not (on_gpu and explorers.nccl):
            raise ConfigurationError(
                "CollectiveTransport(backend='nccl') needs the trainer and a vLLM engine on GPUs, and a strategy that "
                "waits for pushes (asynchronous ones push from a snapshot in the CPU's memory): use backend='auto'"
            )
        if self.backend == "nccl" or (self.backend == "auto" and on_gpu and explorers.nccl):
            return NCCLSender(self.timeout_s)
        return GlooSender(self.timeout_s, self.bucket_mib << 20)


def _watched(function: Callable[[], None], members: Mapping[int, int], explorers: Explorers, deadline: float) -> None:
    """Runs a blocking collective on a thread, so that the death of a member ends it at once.

    Raises:
        LinkError: A member is gone or the deadline has passed: the group is of no use any more.
        Exception: What ends the run.
    """
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            # These frames hold the group: while they do, it keeps its connections, and whoever waits for the rest of
            # this push would not learn that it broke off.
            traceback.clear_frames(error.__traceback__)
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, name="weight-push", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_WATCH_S)
        explorers.raise_failures()
        if gone := members.keys() - explorers.members().keys():
            raise LinkError(f"explorers {sorted(gone)} are gone")
        if time.monotonic() > deadline:
            raise LinkError(f"a weight push passed its deadline: raise {_SETTING}")
    error = outcome[0]
    if isinstance(error, (RuntimeError, OSError)) and not isinstance(error, RFTError):
        raise LinkError(f"a weight push broke off: {error}") from error
    if error is not None:
        raise error
