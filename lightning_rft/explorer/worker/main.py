"""The explorer process: ``python -m lightning_rft.explorer.worker.main FD PARENT``.

It knows nothing of strategies: it runs the groups it is given and loads weights when told. When rank 0 is gone, its
process group is killed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import sys
import threading
import traceback
from typing import Any

from lightning_rft.channel import Channel, Failure
from lightning_rft.explorer.messages import Failed, Prepare
from lightning_rft.explorer.worker import watcher
from lightning_rft.explorer.worker.explorer import Explorer, next_message
from lightning_rft.explorer.worker.outbox import Outbox
from lightning_rft.explorer.worker.users_code import not_rebuilt, note_programs
from lightning_rft.pickling import dumps

__all__ = ["main"]

_END = dumps(None)


def _listen(channel: Channel, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any]) -> None:
    """Feeds the inbox; the end of the line is the end of this process and everything it started."""
    packed = b""
    while packed != _END:  # told to end: the main thread does
        try:
            packed = channel.receive_packed()
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)
        loop.call_soon_threadsafe(inbox.put_nowait, packed)


async def _main(channel: Channel) -> None:
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_listen, args=(channel, loop, inbox), name="listener", daemon=True).start()
    outbox = Outbox(channel, lambda error: loop.call_soon_threadsafe(inbox.put_nowait, error))
    explorer: Explorer | None = None
    try:
        message = await next_message(inbox)
        if isinstance(message, Prepare):
            # on this, the main thread: nothing else is to be done yet, and the end of the line is the listener's
            message.engine.prepare()
            message = await _specification(inbox)
        if message is not None:
            explorer = Explorer(outbox, message)
            await explorer.serve(inbox)
    except Exception as error:
        outbox.send(Failed(Failure.of(error)))
        # told before the engine leaves its weight transport, which rank 0 notices too, and which says much less
        outbox.close()
        raise
    finally:
        if explorer is not None:
            explorer.stop()
        outbox.close()


async def _specification(inbox: asyncio.Queue[Any]) -> Any:
    try:
        return await next_message(inbox)
    except pickle.UnpicklingError as error:
        raise not_rebuilt("the reward or workflow", error) from error


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to handle
    if os.getpgrp() != os.getpid():
        raise SystemExit("an explorer must lead its own process group: it is started by ExplorerPool, not by hand")
    gc.disable()  # imports make nothing but what stays; a fifth of the seconds until an engine is ready
    fd, parent = map(int, sys.argv[1:])
    watching = watcher.start(fd, parent)
    note_programs()
    try:
        asyncio.run(_main(Channel(fd, patient=True)))
    except BaseException:
        traceback.print_exc()  # into the log; Python itself would print it too late
    finally:
        # Whatever an engine left behind (tensor-parallel workers, a hung reward) ends with this process.
        sys.stdout.flush()
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)
        del watching  # which ends this process too, once it is forgotten


if __name__ == "__main__":
    main()
