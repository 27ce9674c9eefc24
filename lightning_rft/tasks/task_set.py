"""Tasks to train on, and how an epoch goes through them."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.sources import Tasks, read_tasks

__all__ = ["TaskSet"]


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks to train on, and how an epoch goes through them.

    Args:
        source: :class:`Task` objects, dictionaries, plain prompts, or the path of a JSONL file.
        shuffle: Whether every epoch has an order of its own.
        steps_per_epoch: Batches of an epoch; needed when ``source`` has no length.

    Raises:
        ConfigurationError: ``steps_per_epoch`` is below 1.

    Example::

        data = RFTDataModule(tasks=TaskSet("tasks.jsonl", shuffle=False), reward=reward)
    """

    source: Tasks
    shuffle: bool = True
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise ConfigurationError(f"TaskSet(steps_per_epoch={self.steps_per_epoch}) must be at least 1")

    def read(self, tasks_per_step: int) -> list[Task]:
        """Reads the tasks of an epoch.

        Raises:
            ConfigurationError: There are none, one is no task, or there may be no end of them.
        """
        at_most = None if self.steps_per_epoch is None else self.steps_per_epoch * tasks_per_step
        return read_tasks(self.source, "tasks", at_most)
