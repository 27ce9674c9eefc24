"""What a checkpoint holds of a module's settings, and what it demands of the module that is restored from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_rft.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_rft.trainer.module import RFTModule

__all__ = ["check_settings", "hyperparameters", "note_settings"]

# Plain values alone, which torch.load reads without running code. Whom to trust is not for a file to say.
_SAVED = (
    *("model", "revision", "reference", "attn_implementation", "max_tokens_per_micro_batch", "pass_threshold"),
    *("gradient_checkpointing", "offload_optimizer", "peft_config"),
)


def hyperparameters(module: RFTModule) -> dict[str, Any]:
    """The settings of a module that a checkpoint, and ``hparams.yaml``, hold."""
    return {name: getattr(module, name) for name in _SAVED}


def note_settings(checkpoint: dict[str, Any], module: RFTModule) -> None:
    """Adds to a checkpoint what its hyperparameters, which are plain values, do not say."""
    checkpoint["objective"] = repr(module.objective)


def check_settings(checkpoint: Mapping[str, Any], module: RFTModule, *, resumes: bool) -> None:
    """Raises :class:`ConfigurationError` for another revision of the model; says that the objective is another.

    A trainer that ``resumes`` may well train on with another objective.
    """
    saved = checkpoint.get("hyper_parameters", {})
    revision = saved.get("revision", module.revision)
    if saved.get("model") == module.model and revision != module.revision:
        raise ConfigurationError(
            f"revision={module.revision!r}, but the checkpoint is of {module.model!r} at revision={revision!r}, whose "
            "tokens and config may differ: set it as it was, or start a new run without ckpt_path"
        )
    objective = checkpoint.get("objective", repr(module.objective))
    if not resumes and objective != repr(module.objective):
        rank_zero_warn(f"the checkpoint was trained with {objective}: set objective=... to train on with that")
