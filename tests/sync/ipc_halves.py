"""Both halves of pushes by CUDA IPC, in processes of their own, which do what the test says."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_rft.errors import RFTError
from lightning_rft.sync.transports.ipc import IPCReceiver, IPCSender
from lightning_rft.sync.transports.transport import Weights
from tests.sync.ipc_on_cpu import IPC

#: Signal, what it comes at, and at which time of that; none for none.
Blow = tuple[int, str, int] | None


def struck(cuda: IPC, blow: Blow) -> None:
    """Has the next such event kill or stop this process."""
    if blow is not None:
        number, what, at = blow
        begun = cuda._times.get(what, 0)

        def strike(now: str, times: int) -> None:
            if now == what and times == begun + at:
                os.kill(os.getpid(), number)

        cuda.happens = strike


def explorer(address: str, who: str, folder: str, gpus: list[int], device: int) -> None:
    """A process that holds weights: says what came of each thing that it was told."""
    with pytest.MonkeyPatch.context() as patch, Client(address) as test:
        cuda = IPC.put_in_place(patch, who, Path(folder), gpus)
        test.send((who, os.getpid()))

        def say(answer: Any) -> None:
            test.send_bytes(pickle.dumps(answer))  # with the bytes of tensors, not in memory of torch's

        receiver: IPCReceiver | None = None
        while (told := test.recv()) is not None:
            what, argument, blow = told
            struck(cuda, blow)
            try:
                if what == "connect":
                    if receiver is not None:
                        receiver.close()
                    with torch.cuda.device(torch.device("cuda", device)):
                        receiver = argument[0].open(argument[1])
                    say(("connected", None))
                else:
                    assert receiver is not None
                    say(("loaded", {name: tensor.clone() for name, tensor in receiver.receive(argument)}))
            except RFTError as error:
                say(("failed", error))
        if receiver is not None:
            receiver.close()


def trainer(address: str, folder: str, gpus: list[int], policy: Callable[[int], dict[str, torch.Tensor]]) -> None:
    """A trainer of one explorer with one process; it may not live to the end of its push."""
    with pytest.MonkeyPatch.context() as patch, Client(address) as test:
        cuda = IPC.put_in_place(patch, "trainer", Path(folder), gpus)
        test.send(("trainer", os.getpid()))
        told: Any = test.recv()
        struck(cuda, told)
        sender = IPCSender(torch.device("cuda:0"), 20.0, 64)
        explorers: Any = SimpleNamespace(connect=lambda explorer, link: test.send(("connect", link)))
        sender.join(explorers, {0: 1})
        weights = Weights.of(list(policy(0).items()), "float32")
        test.send(("push", weights.manifest))
        sender.send(sender.begin(weights), weights.manifest)
        sender.close()


#: What ends a process at once, and what only stops it.
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


def end() -> None:
    """Ends this process at once: to end all that was imported would take a second."""
    os._exit(0)
