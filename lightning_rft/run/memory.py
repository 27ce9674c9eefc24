"""Whether what trainer and explorers hold fits the GPUs that they share: arithmetic, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass, replace

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.placement import Placement
from lightning_rft.explorer.pool import ExplorerPool
from lightning_rft.trainer.loading import without_memory
from lightning_rft.trainer.module import RFTModule

__all__ = ["Held", "check_fit", "check_memory"]


@dataclass(frozen=True)
class Held:
    """Bytes that the trainer holds on each of its GPUs, whatever its optimizer and its batches are."""

    weights: float  #: In either turn, those of the reference model included.
    gradients: float  #: In its own turn alone.

    @classmethod
    def count(cls, policy: torch.nn.Module, *, half: bool, reference: bool, ranks: int) -> Held:
        """Counts those of a policy in half or single precision, with a ``reference`` model, in shards of ``ranks``.

        Example:
            >>> Held.count(torch.nn.Linear(10, 10, bias=False), half=False, reference=False, ranks=2)
            Held(weights=200.0, gradients=200.0)
        """
        everything = sum(parameter.numel() for parameter in policy.parameters())
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
        size = 2 if half else 4
        return cls((size + 4 * reference) * everything / ranks, size * trained / ranks)


def check_fit(held: Held, *, total: float, share: float, engines: int) -> str:
    """Says what is on a GPU of ``total`` bytes, of which each of the ``engines`` on it takes a ``share``.

    Raises:
        ConfigurationError: One of the turns takes more than there is, with the arithmetic.

    Example:
        >>> check_fit(Held(6e9, 6e9), total=80e9, share=0.45, engines=1)
        'Of 80.0 GB: 36.0 for engines and 6.0 for the trainer while explorers explore, 12.0 and the optimizer while it \
trains.'
    """
    explores, trains = engines * share * total + held.weights, held.weights + held.gradients
    if trains > total:
        raise ConfigurationError(
            f"the trainer's weights and gradients take {trains / 1e9:.1f} GB of a GPU, which has {total / 1e9:.1f}: "
            "use more GPUs with ModelParallelStrategy, or an adapter, RFTModule(peft_config=...)"
        )
    if explores > total:
        room = (total - held.weights) / total / engines
        raise ConfigurationError(
            f"trainer and explorers share GPUs of {total / 1e9:.1f} GB: while explorers explore, {engines} x {share:g} "
            f"for engines makes {engines * share * total / 1e9:.1f} GB, and the trainer's weights take "
            f"{held.weights / 1e9:.1f} GB: set VLLMEngine(gpu_memory_utilization=...) below {room:.2f}, or use "
            "more GPUs"
        )
    return (
        f"Of {total / 1e9:.1f} GB: {(explores - held.weights) / 1e9:.1f} for engines and {held.weights / 1e9:.1f} for "
        f"the trainer while explorers explore, {trains / 1e9:.1f} and the optimizer while it trains."
    )


def check_memory(trainer: L.Trainer, pool: ExplorerPool, placement: Placement) -> None:
    """Says what is on each GPU that trainer and explorers share; ConfigurationError if that cannot be."""
    share = pool.engine.memory_share
    if not pool.engine.sleeps or share is None:
        return
    module = trainer.lightning_module
    assert isinstance(module, RFTModule)
    policy = module.policy or without_memory(module.pretrained, module.attn_implementation, module.peft_config)
    held = Held.count(
        policy,
        half=trainer.precision == "bf16-true",
        reference=module.objective.needs_reference and module.peft_config is None,
        ranks=trainer.world_size if isinstance(trainer.strategy, ModelParallelStrategy) else 1,
    )
    trains = trainer.state.fn == TrainerFn.FITTING
    if not trains:
        held = replace(held, gradients=0.0)
    total = torch.cuda.get_device_properties(trainer.strategy.root_device).total_memory
    said = check_fit(held, total=total, share=share, engines=placement.beside_trainer)
    if trains:
        rank_zero_info(said)
