"""Where a buffer may lie, and who may read it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from lightning_rft.buffer import database
from lightning_rft.buffer.database import check_filesystem, filesystem
from lightning_rft.buffer.ledger import Ledger, State
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import GroupKey
from tests.buffer.groups import bring

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
23 22 0:21 / /home rw shared:2 master:1 - nfs4 server:/home rw,vers=4.2
24 23 0:22 / /home/me/scratch rw - xfs /dev/vdb rw
25 22 0:23 / /mnt/with\040blank rw - fuse.sshfs me@host:/ rw
26 22 0:24 / /over rw - nfs a:/ rw
27 26 0:25 / /over rw - tmpfs tmpfs rw
28 22 0:26 / /share rw - 9p share rw
a line that says nothing
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/homework/rft", "ext4"),  # not below /home
        ("/home/me/rft/buffer.sqlite", "nfs4"),
        ("/home/me/scratch/rft", "xfs"),
        ("/mnt/with blank/rft", "fuse.sshfs"),
        ("/over/rft", "tmpfs"),  # what was mounted last
        ("/share", "9p"),
    ],
)
def test_the_longest_mount_point_counts(path: str, kind: str) -> None:
    assert filesystem(Path(path), MOUNTS) == kind


def test_nothing_is_known_without_mounts() -> None:
    assert filesystem(Path("/home"), "") is None


def test_a_network_filesystem_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 254:0 / / rw - ext4 /dev/vda rw\n23 22 0:21 / {tmp_path}/far rw - lustre a rw\n")
    monkeypatch.setattr(database, "_MOUNTS", mounts)
    (tmp_path / "link").symlink_to(tmp_path / "far")
    for folder in ("far", "link"):
        with pytest.raises(ConfigurationError, match=r"buffer .* network filesystem \(lustre\).*`buffer`"):
            Ledger.open(tmp_path / folder / "buffer.sqlite")
    assert not (tmp_path / "far").exists()
    Ledger.open(tmp_path / "near" / "buffer.sqlite").close()
    monkeypatch.setattr(database, "_MOUNTS", tmp_path / "none")  # another system
    check_filesystem(tmp_path / "far")


def test_file_and_folder_are_for_the_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "rft"
    with Ledger.open(folder / "buffer.sqlite") as ledger:
        ledger.begin()
        bring(ledger, GroupKey(0, 0), State.READY)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    names = ("buffer.sqlite", "buffer.sqlite-shm", "buffer.sqlite-wal", "buffer.sqlite.lock")
    assert modes == dict.fromkeys(names, 0o600)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
