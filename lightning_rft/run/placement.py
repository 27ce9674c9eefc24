"""GPUs and CPU threads of explorers and trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.placement import Placement, place
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.hardware import available_cpus, share_cores
from lightning_rft.sync.strategy import SyncStrategy

__all__ = ["cpu_threads", "devices_beside", "gpu_placement", "idle_gpus", "takes_turns"]

_MOST_SHARED = (
    0.8  # of a GPU's memory, by all engines on it; the trainer holds several times the bytes of their weights
)


def gpu_placement(trainer: L.Trainer, strategy: SyncStrategy, pool: ExplorerPool) -> Placement:
    """Plans the GPUs of trainer and explorers.

    Raises:
        ConfigurationError: They do not fit, the transport cannot work there, or the explorers were launched before
            their GPUs could be known.
    """
    visible = _visible()
    if not pool.launcher.local:  # the trainer's alone, and explorers' are other machines'
        return _elsewhere(visible, trainer, strategy, pool)
    try:
        placed = place(visible, _trainers(trainer), pool.count, pool.engine.gpus, pool.placement, pool.devices)
    except ConfigurationError as error:
        if trainer.num_nodes == 1:
            raise
        raise ConfigurationError(
            f"{error}; that is of the first of {trainer.num_nodes} nodes, which alone starts explorers: from others "
            "they dial in, by ExplorerPool(launcher=DialIn(...))"
        ) from error
    sees_others = any(set(gpus) != set(visible) for gpus in placed.explorers)
    if pool.running and pool.devices is None and sees_others:
        raise ConfigurationError(
            "ExplorerPool.launch() came before the trainer's GPUs were known, so that every explorer would take the "
            f"first: set ExplorerPool(devices={placed.devices}), or leave launch() out"
        )
    engine = pool.engine
    engine.tenants = placed.tenants if placed.explorers and engine.gpus else 1
    engine.sleeps = bool(engine.gpus and placed.beside_trainer)
    if takes_turns(trainer, strategy, pool):
        engine.check_sharing()
    share, engines = engine.memory_share, placed.beside_trainer
    if share is not None and share * engines > _MOST_SHARED:
        raise ConfigurationError(
            f"{placed}: {share:g} of a GPU's memory for each engine leaves too little for the trainer, which shares "
            f"it: leave gpu_memory_utilization out, or set it to at most {_MOST_SHARED / engines:.2g}"
        )
    strategy.transport.check(nccl=placed.nccl, apart=placed.apart)
    return placed


def takes_turns(trainer: L.Trainer, strategy: SyncStrategy, pool: ExplorerPool) -> bool:
    """Whether explorers sleep while the trainer trains, since they share its GPUs.

    Raises:
        ConfigurationError: The strategy has both work at the same time.
    """
    if not pool.engine.sleeps or trainer.state.fn != TrainerFn.FITTING:
        return False
    if strategy.overlaps:
        raise ConfigurationError(
            f"explorers share the trainer's GPUs, where they take turns, but {type(strategy).__name__} has both work "
            "at the same time: set Trainer(callbacks=[lightning_rft.Synchronous()]), or give explorers GPUs of their "
            "own, with fewer Trainer(devices=...) and ExplorerPool(placement='separate')"
        )
    return True


def _elsewhere(visible: Sequence[str], trainer: L.Trainer, strategy: SyncStrategy, pool: ExplorerPool) -> Placement:
    """The placement where explorers run on other machines: of this one's GPUs, only the trainer's are planned."""
    pool.engine.tenants, pool.engine.sleeps = 1, False
    strategy.transport.check(nccl=False, apart="they are on other machines")
    return place(visible, _trainers(trainer), pool.count, each=0)


def idle_gpus(trainer: L.Trainer, pool: ExplorerPool) -> list[str]:
    """Names of the GPUs here that the trainer leaves free, if explorers take GPUs and do not come by themselves."""
    visible, used = _visible(), _trainers(trainer)
    wanted = pool.launcher.local and pool.engine.gpus
    return [name for index, name in enumerate(visible) if index not in used] if wanted else []


def devices_beside(pool: ExplorerPool) -> int | str:
    """What ``Trainer(devices="auto")`` is to take, so that explorers have GPUs of their own where that is possible."""
    needed = pool.count * pool.engine.gpus if pool.launcher.local else 0
    left = len(_visible()) - needed
    return left if needed and left > 0 and pool.devices is None and pool.placement != "shared" else "auto"


def cpu_threads(trainer: L.Trainer, strategy: SyncStrategy, pool: ExplorerPool) -> tuple[int, int]:
    """CPU threads of each explorer and of the trainer."""
    trains_on_cpu = trainer.strategy.root_device.type == "cpu"
    overlap = trains_on_cpu and trainer.state.fn == TrainerFn.FITTING and strategy.overlaps
    return share_cores(available_cpus(), pool.count, overlap=overlap and pool.launcher.local)


def _visible() -> list[str]:
    """Names of this process's GPUs, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not count:
        return [str(index) for index in range(count)]
    names = [name.strip() for name in named.split(",")]
    # A process sees only the first part of a GPU (MIG) that is named, but explorers are processes of their own.
    return names if names[0].startswith("MIG-") else names[:count]


def _trainers(trainer: L.Trainer) -> list[int]:
    """Indices of the trainer's GPUs on this machine."""
    strategy = trainer.strategy
    devices = strategy.parallel_devices if isinstance(strategy, ParallelStrategy) else [strategy.root_device]
    return [device.index or 0 for device in devices or [] if device.type == "cuda"]
