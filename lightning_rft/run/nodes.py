"""Checks of the trainer's nodes against the first, which alone starts explorers."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.run.placement import idle_gpus
from lightning_rft.trainer.ranks import Ranks

__all__ = ["check_nodes"]

_log = logging.getLogger(__name__)

# With others on one of the ranks, it would train other weights than the rest, or another number of batches.
_SETTINGS = (
    *("num_nodes", "num_devices", "precision", "max_epochs", "max_steps", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm"),
)


def check_nodes(ranks: Ranks, trainer: L.Trainer, pool: ExplorerPool | None) -> None:
    """Warns of GPUs of this node that nobody uses, if there is a pool; all ranks together.

    Raises:
        ConfigurationError: The settings of this rank's trainer are not those of rank 0's.
    """
    own: dict[str, Any] = {name: getattr(trainer, name) for name in _SETTINGS}
    own |= {"strategy": type(trainer.strategy).__name__, "objective": type(trainer.lightning_module.objective).__name__}
    first = ranks.agree("the settings of rank 0", lambda: own)
    if other := [f"{name}={own[name]} where rank 0 has {first[name]}" for name in own if own[name] != first[name]]:
        raise ConfigurationError(
            f"rank {ranks.rank}, on node {trainer.node_rank}, has {', '.join(other)}: start the same command, with the "
            "same settings, on every node"
        )
    idle = [] if pool is None else idle_gpus(trainer, pool)
    if trainer.node_rank > 0 and trainer.local_rank == 0 and idle:
        _log.warning(
            "nobody uses GPUs %s of node %d, since explorers are started on the first node alone: raise "
            "Trainer(devices=...), or have explorers of this node dial in, by ExplorerPool(launcher=DialIn(...))",
            ", ".join(idle),
            trainer.node_rank,
        )
