"""Validation's tasks: explored beside the schedule, by explorers that have weights."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rft.experience import Group, GroupKey, Task
from lightning_rft.explorer.messages import Explore, Explored
from lightning_rft.settings import Sampling

__all__ = ["Validation"]

_BATCH = -1  # the batch index of validation's groups, which no schedule knows


class Validation:
    """Some tasks and their answers. Not thread-safe.

    Args:
        tasks: The tasks.
        run: Number of the run that asks.
        samples: Answers to each.
        sampling: How they are sampled.
    """

    def __init__(self, tasks: Sequence[Task], *, run: int, samples: int, sampling: Sampling) -> None:
        seeds = tuple((sampling.seed or 0) + sample for sample in range(samples))
        self._questions = [
            Explore(run, GroupKey(_BATCH, index), 0, task, seeds, sampling) for index, task in enumerate(tasks)
        ]
        #: By index of the task; without the samples that failed.
        self.answers: dict[int, Group] = {}

    @staticmethod
    def owns(key: GroupKey) -> bool:
        """Whether a group is one of validation's."""
        return key.batch == _BATCH

    def open(self, running: set[GroupKey]) -> list[Explore]:
        """What is not answered and not among the groups that explorers work on."""
        return [
            question
            for question in self._questions
            if question.key.slot not in self.answers and question.key not in running
        ]

    @property
    def progress(self) -> tuple[int, int]:
        """How many tasks are answered, and how many there are."""
        return len(self.answers), len(self._questions)

    def answered(self, message: Explored) -> None:
        """Takes in a group."""
        self.answers[message.key.slot] = Group(message.key, message.task_id, message.experiences)
