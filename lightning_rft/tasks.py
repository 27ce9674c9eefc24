"""Where tasks come from, and which task belongs in which place of the schedule."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_rft.errors import ConfigurationError, ScheduleError
from lightning_rft.experience import GroupKey, Task

__all__ = ["TaskPlan", "as_tasks", "read_jsonl", "reasoning_gym_tasks"]


def as_tasks(tasks: Iterable[Task | Mapping[str, Any] | str], *, setting: str = "tasks") -> list[Task]:
    """Turn what users write as tasks into tasks with unique ids.

    Args:
        tasks: Tasks; plain prompts; or mappings with ``prompt`` (or ``question``), ``answer``, ``id`` and ``metadata``,
            whose other keys join the metadata. An empty id becomes the position: ``"0"``, ``"1"``, ...
        setting: What the user knows ``tasks`` as, for errors.

    Raises:
        ConfigurationError: There are no tasks, one has no usable prompt or a wrong type, or two share an id.

    Example:
        >>> as_tasks([{"question": "2 + 2 =", "answer": 4, "level": "easy"}])
        [Task(prompt='2 + 2 =', answer=4, id='0', metadata={'level': 'easy'})]
    """
    if isinstance(tasks, str | bytes | Mapping | Task) or not isinstance(tasks, Iterable):
        raise ConfigurationError(f"{setting} is a {type(tasks).__name__}: give a list of tasks, even for a single one")
    result: list[Task] = []
    position_of: dict[str, int] = {}
    for position, item in enumerate(tasks):
        task = _as_task(item, f"{setting}[{position}]")
        task = task if task.id else replace(task, id=str(position))
        first = position_of.setdefault(task.id, position)
        if first != position:
            raise ConfigurationError(
                f"{setting}[{position}] has the id {task.id!r} of {setting}[{first}]: make ids unique, or empty"
            )
        result.append(task)
    if not result:
        raise ConfigurationError(f"{setting} is empty: give at least one task")
    return result


def read_jsonl(path: str | Path) -> list[Task]:
    """Read tasks from a file with one JSON value a line, each as :func:`as_tasks` takes it; blank lines are skipped.

    Ids that the file leaves out stay empty, so that several lists can be joined.

    Raises:
        ConfigurationError: The file cannot be read or is empty, or a line (its number is given) is no task.
    """
    tasks: list[Task] = []
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise ConfigurationError(f"{where}: not JSON ({error}); write one JSON object a line") from error
                tasks.append(_as_task(value, where))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"tasks cannot be read from {path} ({error}): give a JSONL file in UTF-8") from error
    if not tasks:
        raise ConfigurationError(f"{path} has no tasks: give a file with at least one")
    return tasks


def reasoning_gym_tasks(name: str, size: int, seed: int, *, template: str | None = None, **config: Any) -> list[Task]:
    """Generate tasks with `reasoning-gym <https://github.com/open-thought/reasoning-gym>`_.

    Args:
        name: A dataset of reasoning-gym, such as ``"basic_arithmetic"``.
        size: How many tasks.
        seed: Equal seeds give equal tasks; use another one for validation.
        template: What the user says, with ``{question}`` where the question goes. Default: the question alone.
        config: Further settings of the dataset, such as ``max_digits=2``.

    Returns:
        Tasks without ids whose prompt is one chat message of the user, and whose metadata is that of reasoning-gym
        with the dataset's name as ``"dataset"``.

    Raises:
        ConfigurationError: reasoning-gym is not installed, or does not accept ``name`` or ``config``.
    """
    if template is not None and "{question}" not in template:
        raise ConfigurationError(f"template {template!r} has no place for the question: put {{question}} in it")
    try:
        reasoning_gym = importlib.import_module("reasoning_gym")  # slow to import, and optional
    except ImportError as error:
        raise ConfigurationError("reasoning_gym_tasks needs reasoning-gym: pip install reasoning-gym") from error
    names = reasoning_gym.factory.DATASETS
    if name not in names:
        near = difflib.get_close_matches(name, names) or sorted(names)
        raise ConfigurationError(f"name {name!r} is no dataset of reasoning-gym: use one of {', '.join(near)}")
    try:
        entries = list(reasoning_gym.create_dataset(name, size=size, seed=seed, **config))
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"reasoning-gym refuses the settings of {name!r} ({error}): correct size={size}, seed={seed}, {config}"
        ) from error
    return [
        Task(
            prompt=[{"role": "user", "content": (template or "{question}").replace("{question}", entry["question"])}],
            answer=entry["answer"],
            metadata={**entry["metadata"], "dataset": name},
        )
        for entry in entries
    ]


@dataclass(frozen=True, eq=False)
class TaskPlan:
    """Which task each group of the schedule answers: the same on every machine, in every process, after every resume.

    Args:
        tasks: Tasks with unique ids, as from :func:`as_tasks`.
        tasks_per_step: Groups in a batch.
        batches_per_epoch: Batches of each epoch that are used, at most :meth:`batches` of the tasks; limits leave out
            the rest, which with ``shuffle`` is another rest in each epoch.
        shuffle: Whether each epoch has its own order, drawn from ``seed`` and its number.
        seed: The run's seed.
        first_batch: Index of the first batch that this plan knows.
        first_epoch: Number of the epoch that ``first_batch`` begins.

    Raises:
        ConfigurationError: There are no tasks, or a count is out of range.

    Example:
        >>> plan = TaskPlan(as_tasks(["a", "b", "c"]), 2, batches_per_epoch=2, shuffle=False, seed=0)
        >>> plan.task(GroupKey(batch=3, slot=0)).prompt, plan.epoch(3), plan.size(3)
        ('c', 1, 1)
    """

    tasks: Sequence[Task] = field(repr=False)
    tasks_per_step: int
    batches_per_epoch: int
    shuffle: bool
    seed: int
    first_batch: int = 0
    first_epoch: int = 0
    _orders: dict[int, Sequence[int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigurationError("tasks is empty: give at least one task")
        if self.tasks_per_step < 1:
            raise ConfigurationError(f"tasks_per_step is {self.tasks_per_step}: set at least 1")
        most = self.batches(len(self.tasks), self.tasks_per_step)
        if not 1 <= self.batches_per_epoch <= most:
            raise ConfigurationError(
                f"batches_per_epoch is {self.batches_per_epoch}: {len(self.tasks)} tasks, {self.tasks_per_step} a "
                f"step, make {most}; set 1 to {most}"
            )

    @staticmethod
    def batches(n_tasks: int, tasks_per_step: int) -> int:
        """Batches that hold all tasks once; the last may be short."""
        return -(-n_tasks // tasks_per_step)

    def epoch(self, batch: int) -> int:
        """The epoch that a batch belongs to.

        Raises:
            ScheduleError: The batch lies before ``first_batch``.
        """
        return self._place(batch)[0]

    def size(self, batch: int) -> int:
        """Groups in a batch: ``tasks_per_step``, or fewer in the last one of a whole epoch.

        Raises:
            ScheduleError: The batch lies before ``first_batch``.
        """
        _, start = self._place(batch)
        return min(self.tasks_per_step, len(self.tasks) - start)

    def task(self, key: GroupKey) -> Task:
        """The task that a group answers.

        Raises:
            ScheduleError: There is no such group.
        """
        epoch, start = self._place(key.batch)
        if not 0 <= key.slot < self.size(key.batch):
            raise ScheduleError(
                f"group {tuple(key)} is not planned: batch {key.batch} has {self.size(key.batch)} groups"
            )
        return self.tasks[self._order(epoch)[start + key.slot]]

    def sample_seed(self, key: GroupKey, sample: int) -> int:
        """Seed of one sample of a group, 0 to 2**31 - 1, drawn from run seed, epoch, task id and ``sample``.

        The batch does not enter: a sample is repeated wherever the schedule puts its task in the epoch.

        Raises:
            ScheduleError: There is no such group.
        """
        return _draw("sample", self.seed, self.epoch(key.batch), self.task(key).id, sample) & 0x7FFFFFFF

    def _place(self, batch: int) -> tuple[int, int]:
        """The epoch of a batch, and how many tasks of the epoch come before it."""
        if batch < self.first_batch:
            raise ScheduleError(f"batch {batch} is not planned: the plan starts at batch {self.first_batch}")
        epochs, index = divmod(batch - self.first_batch, self.batches_per_epoch)
        return self.first_epoch + epochs, index * self.tasks_per_step

    def _order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.tasks))
        order = self._orders.get(epoch)
        if order is None:
            # Sorting by random() instead of shuffle(): Python promises to keep the former's sequence, not the latter's.
            draw = random.Random(_draw("order", self.seed, epoch)).random
            keys = [draw() for _ in self.tasks]
            order = sorted(range(len(keys)), key=keys.__getitem__)
            # Issuing runs at most one epoch ahead of training: two orders are ever in use.
            for stale in list(self._orders)[:-1]:
                self._orders.pop(stale, None)
            self._orders[epoch] = order
        return order


def _draw(*parts: str | int) -> int:
    """64 bits that depend on every part, alike in all processes (``hash`` is not)."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _as_task(value: Any, where: str) -> Task:
    """Return one task, checked, its id a string; ``where`` is what errors call it."""
    if isinstance(value, str):
        task = Task(value)
    elif isinstance(value, Mapping):
        rest = dict(value)
        prompt = rest.pop("prompt", None)
        prompt = rest.pop("question", None) if prompt is None else prompt
        answer, name, metadata = rest.pop("answer", None), rest.pop("id", None), rest.pop("metadata", None) or {}
        if not isinstance(metadata, Mapping):
            raise ConfigurationError(f"{where}: metadata is a {type(metadata).__name__}; give a mapping")
        task = Task(prompt, answer=answer, id="" if name is None else str(name), metadata={**metadata, **rest})
    elif isinstance(value, Task):
        task = value if isinstance(value.id, str) else replace(value, id=str(value.id))
    else:
        raise ConfigurationError(f"{where} is a {type(value).__name__}; give a Task, a mapping or a string")
    problem = _prompt_problem(task.prompt)
    if problem:
        raise ConfigurationError(f"{where}: {problem}; give text, or chat messages with `role` and `content`")
    return task


def _prompt_problem(prompt: Any) -> str | None:
    if prompt is None:
        return "no `prompt` (or `question`)"
    if isinstance(prompt, str):
        return None if prompt.strip() else "the prompt is blank"
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        return f"the prompt is a {type(prompt).__name__}"
    if not prompt:
        return "the prompt has no messages"
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return f"message {index} of the prompt lacks role or content"
    return None
