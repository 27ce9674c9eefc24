"""What explorers are told when they start, from what is set of a run."""

from __future__ import annotations

from lightning_rft.explorer.context import fitting_length
from lightning_rft.explorer.worker.main import ExplorerSpec
from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.model_folder import check_model
from lightning_rft.settings import Settings

__all__ = ["explorer_spec"]


def explorer_spec(settings: Settings, model: str) -> ExplorerSpec:
    """What every explorer runs, once it is certain that it can.

    Args:
        settings: What is set of the run.
        model: Path of a folder, or hub name, of the trainer's model; explorers take it unless the engine names another.

    Raises:
        ConfigurationError: The model is not whole, the engine cannot run, or prompts do not fit.
    """
    assert settings.reward is not None, "checked when it was set"
    model = settings.engine.model or model
    check_model(model)
    settings.engine.check()
    return ExplorerSpec(
        engine=settings.engine,
        model=model,
        workflow=settings.workflow,
        reward=settings.reward,
        max_new_tokens=settings.max_new_tokens,
        max_model_len=fitting_length(
            model,
            [task.prompt for task in [*settings.tasks, *settings.val_tasks]],
            max_new_tokens=settings.max_new_tokens,
            max_model_len=settings.max_model_len,
            single_turn=isinstance(settings.workflow, SingleTurn),
        ),
        seed=settings.seed,
        retries=settings.retries,
        reward_timeout_s=settings.reward_timeout_s,
        sample_timeout_s=settings.sample_timeout_s,
    )
