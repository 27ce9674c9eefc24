"""Weight transport by checkpoint: safetensors in a folder that trainer and explorers see."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from lightning_rft.errors import ConfigurationError, TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.sync.transports.transport import Explorers, Transport, Weights

__all__ = ["CheckpointLink", "CheckpointTransport"]

_FILE = "model.safetensors"
_SETTING = "CheckpointTransport(timeout_s=...)"


class CheckpointTransport(Transport):
    """Writes a checkpoint and has explorers read it: they need not meet, only see the same folder.

    A checkpoint is written to a temporary folder, synced to disk, and renamed, so that a reader finds all of it or
    nothing; only then is it announced. It names the run that wrote it, and an explorer refuses any other.

    Args:
        dirpath: Folder for checkpoints, on a disk that every explorer sees; each run makes a folder of its own in it,
            ``<run>/version-<n>/model.safetensors``, and leaves the last ones there. Left out: ``weights`` in the run's
            own folder, removed at the end.
        keep: Maximum number of checkpoints to keep, at least 1; an older one is removed when no explorer can be
            reading it.
        timeout_s: Seconds that explorers may take to load one.

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
        self._folder: Path | None = None  # of this run, whose id is its name
        self._written: dict[int, tuple[Path, Sequence[TensorInfo]]] = {}  # by version, the oldest first

    @override
    def prepare(self, weights: Weights, version: int, explorers: Explorers) -> bool:
        if version in self._written:
            return False
        if self._folder is None:
            self._folder = Path(self.dirpath or explorers.folder / "weights").absolute() / uuid.uuid4().hex
        folder = self._folder / f"version-{version:08d}"
        try:
            _write(folder, weights, {"run": self._folder.name, "version": str(version)})
        except OSError as error:
            raise TransportError(
                f"checkpoint {folder} cannot be written ({error}): free some space, or set "
                "CheckpointTransport(dirpath=...) to another disk"
            ) from error
        self._written[version] = folder, weights.manifest
        # every reader reads the newest: the next one is written only when the push of this one has ended
        for old in list(self._written)[: -self.keep]:
            shutil.rmtree(self._written.pop(old)[0], ignore_errors=True)
        return True

    @override
    def push(self, weights: Weights, version: int, explorers: Explorers, to: Sequence[int] | None = None) -> None:
        self.prepare(weights, version, explorers)
        folder, manifest = self._written[version]
        members = [explorer for explorer in explorers.members() if to is None or explorer in to]
        for explorer in members:
            explorers.connect(explorer, CheckpointLink(str(folder / _FILE), folder.parent.name, version))
            explorers.load(explorer, manifest, version)
        explorers.wait_loaded(version, members, self.timeout_s, _SETTING)

    @override
    def close(self) -> None:
        folder, self._folder = self._folder, None
        self._written.clear()
        if folder is not None and self.dirpath is None:  # a folder of the user's keeps what it has
            shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """Writes to a temporary folder, syncs and renames it, so that ``folder`` exists completely or not at all."""
    from safetensors.torch import save_file

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        dtypes = {info.name: getattr(torch, info.dtype) for info in weights.manifest}
        tensors = {name: tensor.to("cpu", dtypes[name]).contiguous() for name, tensor in weights.tensors()}
        # tensors that share memory but are no aliases are copied: the file format knows no sharing
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if tensor.data_ptr() in seen:
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        save_file(tensors, unfinished / _FILE, metadata)
        for path in (unfinished / _FILE, unfinished):
            _sync(path)
        os.rename(unfinished, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class CheckpointLink:
    """An invitation to read a checkpoint, which must be this version and written by this run; it is the reader, too."""

    path: str
    run: str
    version: int

    def open(self, member: int) -> CheckpointLink:
        """Returns itself: each process of an engine reads for itself."""
        return self

    def receive(self, manifest: Sequence[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors, mapped into memory; raises :class:`TransportError` before the first if any is wrong."""
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise TransportError(f"checkpoint {self.path} is torn or missing ({error}): it was not loaded") from error
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
