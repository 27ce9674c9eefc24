"""A process that kills an explorer's process group when rank 0 is gone, even if the interpreter lock is held for ever.

``python watcher.py FD PARENT``, started by the explorer: FD is its line to rank 0, whose end is seen without reading;
the standard input ends with the explorer. It imports as little as it can, since it lives as long.
"""

import os
import select
import signal
import subprocess
import sys

__all__ = ["start"]

_POLL_MS = 1_000
_END = getattr(select, "POLLRDHUP", 0)  # on Linux, the end of a connection whose own half is open; else that is implied


def start(fd: int, parent: int) -> subprocess.Popen[bytes]:
    """Starts the process, which kills the caller's process group, too, once nobody holds what is returned.

    ``parent`` is the process that has started the caller, and may be gone already.
    """
    command = [sys.executable, "-I", "-S", __file__, str(fd), str(parent)]
    return subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.PIPE)


def _watch(fd: int, parent: int) -> None:
    lines = select.poll()
    for line in (fd, sys.stdin.fileno()):
        lines.register(line, _END)  # nothing but the end
    explorer = os.getppid()
    # another process may have inherited rank 0's end, and then it never reads as closed
    while not lines.poll(_POLL_MS) and _parent_of(explorer) in (None, parent):
        pass
    os.killpg(0, signal.SIGKILL)


def _parent_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return int(stat.read().rpartition(")")[2].split()[1])
    except OSError:  # not Linux, where processes are forked without being replaced
        return None


if __name__ == "__main__":
    _watch(int(sys.argv[1]), int(sys.argv[2]))
