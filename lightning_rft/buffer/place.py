"""Where a buffer may lie, and that one run at a time holds it."""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import ExitStack
from pathlib import Path

from lightning_rft.errors import ConfigurationError

__all__ = ["check_filesystem", "filesystem", "lock"]

_MOUNTS = Path("/proc/self/mountinfo")

# SQLite's log is shared memory between the processes of one machine, and locks of these are not to be relied on.
_NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs"),
    *("lustre", "ceph", "beegfs", "gpfs", "glusterfs", "fuse.glusterfs"),
)


def filesystem(path: Path, mounts: str) -> str | None:
    """The type of the filesystem that a path is on, None if it cannot be told.

    Args:
        path: Absolute, without symbolic links. It need not exist.
        mounts: What ``/proc/self/mountinfo`` says.

    Example:
        >>> filesystem(Path("/data/run"), "23 22 0:21 / /data rw,relatime - nfs4 host:/data rw")
        'nfs4'
    """
    found, depth = None, -1
    for line in mounts.splitlines():
        left, dash, right = line.partition(" - ")
        fields = left.split(" ")
        if not dash or len(fields) < 5:
            continue
        # Blanks and the like are written as three octal digits.
        mount = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        # The last of equals: it was mounted over the others.
        if path.is_relative_to(mount) and len(mount.parts) >= depth:
            found, depth = right.split(" ")[0], len(mount.parts)
    return found


def check_filesystem(path: Path) -> None:
    """Refuses a path on a network filesystem. Where the system has no list of mounts, nothing is refused.

    Raises:
        ConfigurationError: It is on one.
    """
    if not _MOUNTS.exists():
        return
    kind = filesystem(path.resolve(), _MOUNTS.read_text(errors="surrogateescape"))
    if kind in _NETWORK:
        raise ConfigurationError(
            f"buffer {str(path)!r} is on a network filesystem ({kind}), where SQLite files get damaged: set `buffer` "
            "to a path on a local disk"
        )


def lock(path: Path, resources: ExitStack) -> None:
    """Holds ``<path>.lock`` until ``resources`` is closed. The file stays: removing it would race with its next owner.

    The lock falls with the process, however it dies.

    Raises:
        ConfigurationError: Another run holds it, or the path cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigurationError(
            f"buffer {str(path)!r} cannot be opened ({error}): set `buffer` to a path that can be written"
        ) from error
    resources.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(file, 32, 0).decode(errors="replace").strip()
        raise ConfigurationError(
            f"buffer {str(path)!r} is in use by another run (process {owner or 'unknown'}): wait until it ends, "
            "or set `buffer` to another path"
        ) from error
    # Unlocked by name, not only closed: a forked child may still have the file open.
    resources.callback(fcntl.flock, file, fcntl.LOCK_UN)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
