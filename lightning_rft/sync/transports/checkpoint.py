"""Weight transport by checkpoint: safetensors in shared memory, or in a folder that trainer and explorers see."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_rft.errors import ConfigurationError, TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.hardware import available_memory
from lightning_rft.network import is_loopback
from lightning_rft.sync.transports.shared_folder import SharedFolder
from lightning_rft.sync.transports.stored import InMemory, OnDisk, Stored, data_bytes
from lightning_rft.sync.transports.transport import Explorers, Transport, Weights

__all__ = ["CheckpointLink", "CheckpointTransport"]

_ROOM = 4  # times a checkpoint: the one that is read, the one that is written, a snapshot, and some air


class CheckpointTransport(Transport):
    """Writes a checkpoint and has explorers read it: they need not meet.

    Checkpoints lie in shared memory where they fit, which leaves nothing behind, however a run ends; else, or with
    ``dirpath``, or where explorers may be on other machines, on a disk. There, one is written to a temporary folder,
    synced, and renamed, so that a reader finds all of it or nothing; only then is it announced. It names the run that
    wrote it, and an explorer refuses any other. One that does not see that disk ends the run, at its first load, with a
    :class:`ConfigurationError`.

    Args:
        dirpath: Folder for checkpoints, on a disk that every explorer sees at the same path; each run makes a folder of
            its own in it, ``<run>/version-<n>/model.safetensors``, and leaves the last ones there. Left out: shared
            memory, if all explorers are on this machine and a quarter of what is free holds one, else ``weights`` in
            the run's own folder, removed at the end.
        keep: Maximum number of checkpoints to keep on the disk, at least 1; an older one is removed when no explorer
            can be reading it. In memory there is one.
        timeout_s: Seconds that explorers may take to load one; those that take longer are ended.

    Raises:
        ConfigurationError: ``keep`` is below 1.
    """

    push_label = "write checkpoint"
    load_label = "load checkpoint"

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, keep: int = 2, timeout_s: float = 120.0) -> None:
        if keep < 1:
            raise ConfigurationError(f"CheckpointTransport(keep={keep}): keep at least 1, the one that is loaded")
        self.dirpath = dirpath
        self.keep = keep
        self.timeout_s = timeout_s
        self._run = ""  # its id, from the first checkpoint on
        self._folder: Path | None = None  # of this run; None in memory
        self._shared: SharedFolder | None = None
        self._written: dict[int, tuple[Stored, Sequence[TensorInfo]]] = {}  # by version, the oldest first

    @override
    def prepare(self, weights: Weights, version: int, explorers: Explorers) -> bool:
        if version in self._written:
            return False
        try:
            if not self._run:
                run = uuid.uuid4().hex
                self._folder = self._place(run, weights, explorers)
                self._shared = None if self._folder is None else SharedFolder.create(self._folder)
                self._run = run
            metadata = {"run": self._run, "version": str(version)}
            stored: Stored
            if self._folder is None:
                stored = InMemory(weights, metadata)
            else:
                stored = OnDisk(self._folder / f"version-{version:08d}", weights, metadata)
        except OSError as error:
            raise TransportError(
                f"checkpoint {self._folder or 'in memory'} cannot be written ({error}): free some space, or set "
                "CheckpointTransport(dirpath=...) to another disk"
            ) from error
        self._written[version] = stored, weights.manifest
        # every reader reads the newest: the next one is written only when the push of this one has ended
        for old in list(self._written)[: -(self.keep if self._folder else 1)]:
            self._written.pop(old)[0].remove()
        return True

    @override
    def push(self, weights: Weights, version: int, explorers: Explorers, to: Sequence[int] | None = None) -> None:
        self.prepare(weights, version, explorers)
        stored, manifest = self._written[version]
        members = [explorer for explorer in explorers.members() if to is None or explorer in to]
        link = CheckpointLink(stored.path, self._run, version, self._shared, self.timeout_s / 2)
        for explorer in members:
            explorers.connect(explorer, link)
            explorers.load(explorer, manifest, version)
        late = explorers.wait_loaded(version, members, self.timeout_s)
        self.end_late(late, f"load version {version}", explorers)

    @override
    def close(self) -> None:
        folder, self._folder, self._run = self._folder, None, ""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.remove()
        if folder is None or self.dirpath is None:  # a folder of the user's keeps what it has
            for stored, _ in self._written.values():
                stored.remove()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        self._written.clear()

    def _place(self, run: str, weights: Weights, explorers: Explorers) -> Path | None:
        """The folder of a run's checkpoints; None if they go into memory."""
        if self.dirpath is not None:
            return Path(self.dirpath).absolute() / run
        size, free, here = data_bytes(weights.manifest), available_memory(), is_loopback(explorers.address)
        if InMemory.supported and here and _ROOM * size <= free:
            return None
        folder = Path(explorers.folder / "weights").absolute() / run
        why = "this system has no files without a name"
        if not here:
            why = "explorers may be on other machines, which must see that folder"
        elif InMemory.supported:
            why = f"a quarter of the {free / 2**30:.1f} GiB that are free does not hold {size / 2**30:.1f} GiB"
        rank_zero_info(f"Checkpoints go to {folder}, not into memory: {why}.")
        return folder


@dataclass(frozen=True)
class CheckpointLink:
    """An invitation to read a checkpoint, which must be this version and written by this run; it is the reader, too."""

    path: str
    run: str
    version: int
    shared: SharedFolder | None = None  #: Where it lies; None for memory.
    patience_s: float = 0.0  #: With a disk that shows it late.

    def open(self, member: int) -> CheckpointLink:
        """Returns itself, since each process of an engine reads for itself, once it sees where checkpoints are."""
        if self.shared is not None:
            self.shared.check(self.patience_s)
        return self

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors, mapped into memory; raises :class:`TransportError` before the first if any is wrong."""
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            where = "" if self.shared else ". An explorer in another container needs CheckpointTransport(dirpath=...)"
            raise TransportError(
                f"checkpoint {self.path} is torn or missing ({error}): it was not loaded{where}"
            ) from error
        with file:
            found = file.metadata() or {}
            if (found.get("run"), found.get("version")) != (self.run, str(self.version)):
                raise TransportError(
                    f"checkpoint {self.path} is version {found.get('version')} of run {found.get('run')}, not version "
                    f"{self.version} of run {self.run}: it was not loaded. Does another run write to the same folder?"
                )
            names = set(file.keys())
            for info in manifest:
                stored = info.same_as or info.name
                held = file.get_slice(stored) if stored in names else None
                if held is None or tuple(held.get_shape()) != info.shape:
                    shape = None if held is None else tuple(held.get_shape())
                    raise TransportError(
                        f"checkpoint {self.path} holds {stored!r} with shape {shape}, but {info.shape} was "
                        "announced: it was not loaded"
                    )
            for info in manifest:
                yield info.name, file.get_tensor(info.same_as or info.name)

    def close(self) -> None:
        """Does nothing: the file is open only while it is read."""
