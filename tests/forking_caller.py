"""Calls what it is sent, each time in a fork that knows nothing of the others: ``python -m tests.forking_caller FD``.

A message is a list of functions, to be called one after another. The answer is what the last one returned, awaited if
need be, or the failure that ended them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
from typing import Any

from lightning_rft.channel import Channel, Failure, unpack


async def run(packed: bytes) -> Any:
    result = None
    for call in unpack(packed):
        result = call()
    return await result if inspect.isawaitable(result) else result


def main(fd: int) -> None:
    channel = Channel(fd)
    with contextlib.suppress(EOFError):
        while True:
            packed = channel.receive_packed()
            fork = os.fork()
            if fork == 0:
                try:
                    channel.send(asyncio.run(run(packed)))
                except Exception as error:
                    channel.send(Failure.of(error))
                os._exit(0)
            os.waitpid(fork, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
