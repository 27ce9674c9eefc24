"""Tasks to train on, and how an epoch goes through them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.curriculum import ByDifficulty, ByPassRate
from lightning_rft.tasks.loading import load, one_split
from lightning_rft.tasks.rows import lines_of, rows_of
from lightning_rft.tasks.source import Source
from lightning_rft.tasks.sources import Tasks
from lightning_rft.tasks.stream import TaskStream
from lightning_rft.tasks.task import FIELDS
from lightning_rft.tasks.task_list import TaskList

__all__ = ["TaskSet", "read_tasks"]


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Tasks to train on, and how an epoch goes through them.

    What has a length is read row by row as tasks are needed: the first 10,000 rows are checked before the start, and a
    later one that is no task is left out, and shown.

    Args:
        source: :class:`Task` objects, dictionaries or plain prompts; a table of pandas, polars, Arrow or ``datasets``;
            a mapping of columns; or the path of a file (JSONL, Parquet, CSV) or folder, or a name on the Hugging Face
            hub. One without a length is read as it is needed, and should begin anew with every ``for``: an iterator,
            which cannot, begins again after its end only if that comes within 10,000 tasks.
        shuffle: Whether every epoch has an order of its own.
        steps_per_epoch: Batches of an epoch, which goes on where the last one ended; needed when ``source`` has no
            length, whose tasks come in their own order. Left out, an epoch is all tasks once.
        split: Which split of a folder, a hub name or a ``DatasetDict``; ``"train[:1000]"`` takes a part.
        name: Configuration of a hub name that has several.
        columns: ``prompt``, ``answer``, ``id`` or ``metadata`` -> the column to take it from, in which dots lead into
            structs. Left out, the usual names are found.
        streaming: Whether a hub name, folder, Parquet or CSV file is read while it is trained on; needs
            ``steps_per_epoch``.
        curriculum: An order that follows how hard tasks are; needs a source with a length.

    Raises:
        ConfigurationError: ``steps_per_epoch`` is below 1, or ``columns`` names no field.

    Example::

        data = RFTDataModule(tasks=TaskSet("openai/gsm8k", name="main", split="train"), reward=reward)
    """

    source: Tasks
    shuffle: bool = True
    steps_per_epoch: int | None = None
    split: str = "train"
    name: str | None = None
    columns: dict[str, str] | None = None
    streaming: bool = False
    curriculum: ByDifficulty | ByPassRate | None = None

    def __post_init__(self) -> None:
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise ConfigurationError(f"TaskSet(steps_per_epoch={self.steps_per_epoch}) must be at least 1")
        unknown = (self.columns or {}).keys() - FIELDS.keys()
        if unknown:
            raise ConfigurationError(
                f"TaskSet(columns={self.columns}): a task has no {', '.join(sorted(unknown))}; give a column for "
                f"{', '.join(FIELDS)}: all others are metadata as they are"
            )

    @property
    def goes_on(self) -> bool:
        """Whether an epoch goes on where the last one ended."""
        return self.steps_per_epoch is not None or isinstance(self.curriculum, ByPassRate)

    def read(self, setting: str = "tasks", *, endless: bool | None = None) -> Sequence[Task] | Source:
        """Reads the tasks, or makes ready to; ``endless`` says whether a source without a length is taken.

        Raises :class:`ConfigurationError` if there are none, one is no task, or there may be no end of them.
        """
        source = self.source
        if isinstance(source, str | Path):
            source = load(source, split=self.split, name=self.name, streaming=self.streaming, setting=setting)
        source = one_split(source, self.split, setting)
        if isinstance(source, Path):
            tasks = TaskList(lines_of(source), setting, self.columns)
        elif isinstance(source, Iterable) and not hasattr(source, "__len__"):
            if not (self.steps_per_epoch is not None if endless is None else endless):
                way_out = "set TaskSet(steps_per_epoch=...), or " if setting == "tasks" else ""
                raise ConfigurationError(f"{setting} has no length: {way_out}give a list")
            if self.curriculum is not None:
                raise ConfigurationError(f"{setting} has no length, so TaskSet(curriculum=...) cannot sort it")
            return TaskStream(source, self.columns)
        else:
            tasks = TaskList(rows_of(source, setting, self.columns), setting, self.columns)
        return tasks if self.curriculum is None else self.curriculum.read(tasks)


def read_tasks(tasks: TaskSet | Tasks, setting: str) -> list[Task]:
    """Reads all tasks of what has a length; raises ConfigurationError as :meth:`TaskSet.read` does, for any of them."""
    read = (tasks if isinstance(tasks, TaskSet) else TaskSet(tasks)).read(setting, endless=False)
    if not isinstance(read, Sequence):
        raise ConfigurationError(f"{setting} has no order to follow: leave TaskSet(curriculum=...) out")
    return list(read)
