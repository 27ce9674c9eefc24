"""Validation's tasks: explored beside the schedule, by explorers that have weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import lightning as L

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group, GroupKey, Task
from lightning_rft.explorer.messages import Explore, Explored
from lightning_rft.settings import Sampling
from lightning_rft.tasks.chance import draw
from lightning_rft.trainer.limits import validation_batches
from lightning_rft.trainer.loader import ValidationLoader

if TYPE_CHECKING:
    from lightning_rft.run.session import Session

__all__ = ["Validation", "validation_loaders", "validation_sampling"]

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
        def seeds(task: Task) -> tuple[int, ...]:
            # of each task its own: with the same random numbers tasks would be right or wrong together
            return tuple(draw("validation", sampling.seed or 0, task.id, n) & 0x7FFFFFFF for n in range(samples))

        self._questions = [
            Explore(run, GroupKey(_BATCH, index), 0, task, seeds(task), sampling) for index, task in enumerate(tasks)
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

    @property
    def done(self) -> bool:
        """Whether all tasks are answered."""
        return len(self.answers) == len(self._questions)

    def answered(self, message: Explored) -> None:
        """Takes in a group."""
        self.answers[message.key.slot] = Group(message.key, message.task_id, message.experiences)


def validation_sampling(given: Sampling, training: Sampling, samples: int) -> Sampling:
    """How validation samples what ``given`` leaves out: as training, but a single answer greedily."""
    if samples < 1:
        raise ConfigurationError(f"val_samples={samples} must be at least 1")
    if samples > 1 and given.temperature == 0:
        raise ConfigurationError(
            f"val_samples={samples} with val_sampling at temperature 0, where all answers are equal: set "
            "val_sampling=Sampling(temperature=...) above 0, or leave it out to sample as in training"
        )
    return given.filled(replace(training, temperature=0.0) if samples == 1 else training)


def validation_loaders(
    sets: Mapping[str, Sequence[Task]],
    session: Session,
    trainer: L.Trainer,
    *,
    samples: int,
    sampling: Sampling,
    chunk: int,
) -> list[ValidationLoader]:
    """A loader for each set, in their order; all sets are explored together from when the first begins."""
    agree = session.ranks.agree
    places: list[range] = []  # of each set's tasks among all that are explored

    def begin(number: int) -> range:
        if number == 0:
            limits = validation_batches(trainer)
            kept = [tasks[: limit * chunk] for tasks, limit in zip(sets.values(), limits, strict=True)]
            ends = accumulate(map(len, kept))
            places[:] = [range(end - len(tasks), end) for tasks, end in zip(kept, ends, strict=True)]
            session.coordinator.explore(list(chain(*kept)), samples=samples, sampling=sampling)
        return places[number]

    def agreed(number: int) -> range:
        return agree("the start of validation", partial(begin, number))

    def explored(index: int) -> Group:
        # every rank gets all answers: there is nothing to compute on them, and all log the same
        return agree(f"validation task {index}", lambda: session.coordinator.explored(index))

    return [
        ValidationLoader(
            partial(agreed, number),
            explored,
            len(tasks),
            chunk,
            val_set=name,
            samples=samples,
            ends=number == len(sets) - 1,
        )
        for number, (name, tasks) in enumerate(sets.items())
    ]
