"""The rendezvous of the trainer's ranks: every other one connects to rank 0, on this machine or over a network."""

from __future__ import annotations

import secrets
import socket
import time

import lightning as L

from lightning_rft.authentication import Gate, prove
from lightning_rft.channel import Channel
from lightning_rft.errors import AuthenticationError, ConfigurationError, DeadlineError, RankError
from lightning_rft.network import LOOPBACK, address_towards, listen

__all__ = ["SILENCE_S", "connect", "gate_at", "join", "welcome"]

#: Of a rank whose connection is still open: it was stopped, or its host is gone.
SILENCE_S = 120.0
_MEET_S = 120.0  # for all ranks to connect; they have just met in Lightning's own group
_PROOF_S = 5.0
_RANK_BYTES = 4
_PAUSE_S = 0.1


def connect(trainer: L.Trainer) -> dict[int, Channel]:
    """Connects the ranks of a trainer, each of which calls this: rank 0 to every other rank, those to rank 0.

    They prove to each other that they know a secret of this run, which Lightning's own process group has carried.

    Raises:
        ConfigurationError: Rank 0 cannot listen at the address by which other nodes would reach it.
        DeadlineError: Not all have connected in time.
        RankError: What answers at rank 0's address is not rank 0.
    """
    rank, count, strategy = trainer.global_rank, trainer.world_size, trainer.strategy
    host = _address_of_rank_0(trainer)
    place: tuple[str, int, bytes] | ConfigurationError | None = None
    if rank != 0:
        place = strategy.broadcast(place)
        if isinstance(place, ConfigurationError):
            raise place
        assert place is not None
        return {0: join(*place, rank)}
    try:
        server = listen(host, count)
    except ConfigurationError as error:
        strategy.broadcast(error)  # the others would wait for it in vain
        raise
    secret = secrets.token_bytes(32)
    with gate_at(server, secret) as gate:
        strategy.broadcast((host, server.getsockname()[1], secret))
        return welcome(gate, count)


def gate_at(server: socket.socket, secret: bytes) -> Gate:
    """Where ranks come in, and each claims its number."""
    return Gate(server, secret, _RANK_BYTES)


def welcome(gate: Gate, count: int, timeout_s: float = _MEET_S) -> dict[int, Channel]:
    """Waits for every other rank; raises :class:`DeadlineError` if some do not come."""
    deadline = time.monotonic() + timeout_s
    peers: dict[int, Channel] = {}
    try:
        while len(peers) < count - 1:
            claim, line = gate.admit(deadline - time.monotonic())
            rank = int.from_bytes(claim, "big")
            if not 0 < rank < count:
                line.close()
                continue
            if rank in peers:  # its first connection broke before it had the answer
                peers[rank].close()
            peers[rank] = _channel(line)
    except BaseException as error:
        for channel in peers.values():
            channel.close()
        if isinstance(error, TimeoutError):
            missing = sorted(set(range(1, count)) - peers.keys())
            raise DeadlineError(f"ranks {missing} did not connect to rank 0 within {timeout_s:g} s") from None
        raise
    return peers


def join(host: str, port: int, secret: bytes, rank: int, timeout_s: float = _MEET_S) -> Channel:
    """Connects to rank 0; raises :class:`DeadlineError` if that cannot be reached."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), max(_PAUSE_S, deadline - time.monotonic())) as line:
                patience_s = min(_PROOF_S, max(_PAUSE_S, deadline - time.monotonic()))
                prove(line, secret, rank.to_bytes(_RANK_BYTES, "big"), patience_s)
                return _channel(line)
        except AuthenticationError as error:
            raise RankError(
                f"what answers at {host}:{port} is not rank 0 of this run ({error}): see what else listens there"
            ) from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"rank {rank} did not reach rank 0 at {host}:{port} within {timeout_s:g} s ({error}): let "
                    "connections between the trainer's nodes pass on all ports, as torch.distributed needs them too, "
                    "or set MASTER_ADDR to another address of the first node"
                ) from error
            time.sleep(_PAUSE_S)  # a crowd of strangers may have pushed this one out


def _address_of_rank_0(trainer: L.Trainer) -> str:
    """An address of rank 0's machine that exists there, and that other nodes reach; known to rank 0 alone.

    A node may know its own name, which is often the main address, by a loopback address, and a cluster may give a name
    that is only forwarded to it. What leads from the last rank, which is on another node, to the main address and back
    does not depend on either.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or trainer.num_nodes == 1:
        return LOOPBACK
    last = trainer.world_size - 1
    theirs = address_towards(environment.main_address) if trainer.global_rank == last else ""
    return address_towards(trainer.strategy.broadcast(theirs, src=last))


def _channel(line: socket.socket) -> Channel:
    """A channel over a connection, which from here on has no timeout of its own and sends without delay."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(line.detach(), silence_s=SILENCE_S)
