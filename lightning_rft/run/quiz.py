"""Validation's tasks: explored beside the schedule, by whoever has weights, and again if an explorer dies with them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rft.experience import Group, GroupKey, Task
from lightning_rft.explorer.connection import Explore, Explored

__all__ = ["Quiz"]

_BATCH = -1  # the batch index of validation's groups, which no schedule knows


class Quiz:
    """Some tasks, who is at them, and their answers. Not thread-safe.

    Args:
        tasks: The tasks.
        run: Number of the run that asks.
        samples: Answers to each.
        temperature: Softmax temperature.
    """

    def __init__(self, tasks: Sequence[Task], *, run: int, samples: int, temperature: float) -> None:
        self._questions = [
            Explore(run, GroupKey(_BATCH, index), 0, task, tuple(range(samples)), temperature)
            for index, task in enumerate(tasks)
        ]
        self._asked: dict[int, int] = {}  # index of a question -> explorer
        #: By index of the task; without the samples that failed.
        self.answers: dict[int, Group] = {}

    @staticmethod
    def owns(message: Explored) -> bool:
        """Whether a group was asked for by a quiz."""
        return message.key.batch == _BATCH

    def ask(self, able: Sequence[int]) -> list[tuple[Explore, int]]:
        """Notes who of the explorers that have weights is to explore what nobody is at; what each is to be told."""
        told = []
        for index, question in enumerate(self._questions):
            if able and index not in self.answers and index not in self._asked:
                explorer = self._asked[index] = able[index % len(able)]
                told.append((question, explorer))
        return told

    def answered(self, message: Explored) -> None:
        """Takes in a group."""
        self.answers[message.key.slot] = Group(message.key, message.task_id, message.experiences)

    @property
    def progress(self) -> tuple[int, int]:
        """How many tasks are answered, and how many there are."""
        return len(self.answers), len(self._questions)

    def gone(self, explorer: int) -> None:
        """Notes that an explorer is dead: what it was at is to be asked again."""
        self._asked = {index: who for index, who in self._asked.items() if who != explorer}
