"""Another process of a benchmark, which runs the same module with the environment of an explorer."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning_rft as rft
from lightning_rft.channel import Channel, spawn
from lightning_rft.hardware import available_cpus

__all__ = ["DEADLINE_S", "beside", "one_of_two"]

DEADLINE_S = 600.0  # for whatever another process is asked


@contextmanager
def beside(module: str) -> Iterator[Channel]:
    """The line to another process of a benchmark, which has an explorer's environment and ends with the block."""
    environment = rft.VLLMEngine().environment(available_cpus())
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process, channel = spawn(module, environment=environment, log=log)
        try:
            yield channel
        except (EOFError, OSError) as error:  # TimeoutError is one
            raise SystemExit(f"{error!r} from {module}:\n{log.read_text()[-3000:]}") from error
        finally:
            channel.close()
            process.kill()
            process.wait(timeout=DEADLINE_S)


def one_of_two(main: Callable[[], None], other: Callable[[Channel], None]) -> None:
    """What a module runs: ``other`` where :func:`beside` has started it, at the end of its line, or else ``main``."""
    options = sys.argv[1:]
    if len(options) == 2 and all(map(str.isdigit, options)):  # as channel.start() gives them
        other(Channel(int(options[0])))
    else:
        main()
