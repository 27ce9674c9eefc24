"""Tasks to train on, and how an epoch goes through them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.sources import Tasks, read_tasks
from lightning_rft.tasks.stream import TaskStream

__all__ = ["TaskSet"]


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks to train on, and how an epoch goes through them.

    Args:
        source: :class:`Task` objects, dictionaries, plain prompts, or the path of a JSONL file. One without a length is
            read as it is needed, and should begin anew with every ``for``: an iterator, which cannot, begins again
            after its end only if that comes within 10,000 tasks.
        shuffle: Whether every epoch has an order of its own.
        steps_per_epoch: Batches of an epoch, which goes on where the last one ended; needed when ``source`` has no
            length, whose tasks come in their own order. Left out, an epoch is all tasks once.

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

    def read(self) -> list[Task] | TaskStream:
        """Reads the tasks, or makes ready to.

        Raises :class:`ConfigurationError` if there are none, one is no task, or there may be no end of them.
        """
        endless = isinstance(self.source, Iterable) and not hasattr(self.source, "__len__")
        return TaskStream(self.source) if self.steps_per_epoch and endless else read_tasks(self.source, "tasks")
