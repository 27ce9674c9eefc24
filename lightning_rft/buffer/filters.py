"""Which groups are worth training at all."""

from __future__ import annotations

from collections.abc import Callable

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group

__all__ = ["Filter", "has_signal"]

_BATCHES = 8  # that may be refused in a row: by then hardly a task is worth anything


def has_signal(group: Group) -> bool:
    """Whether the rewards of a group differ; where they do not, group-relative advantages are all zero.

    As ``Buffer(group_filter=has_signal)`` this is the dynamic sampling of DAPO,
    `Yu et al. 2025 <https://arxiv.org/abs/2503.14476>`_: every batch is full of groups with a gradient, and what the
    policy always or never solves costs its exploration alone.

    Example:
        >>> from lightning_rft.experience import Experience, GroupKey
        >>> def group(*rewards):
        ...     return Group(GroupKey(0, 0), "7", tuple(Experience("7", i, (), r) for i, r in enumerate(rewards)))
        >>> has_signal(group(0.0, 1.0, 0.0)), has_signal(group(1.0, 1.0, 1.0))
        (True, False)
    """
    return len({experience.reward for experience in group.experiences}) > 1


class Filter:
    """Applies a ``group_filter``, and ends a run that would explore for ever.

    Args:
        keep: Called once for every complete group; what it returns false for is refused. ``None`` keeps everything.
        tasks_per_step: Groups of a batch.
    """

    def __init__(self, keep: Callable[[Group], object] | None, tasks_per_step: int) -> None:
        #: Groups refused so far.
        self.refused = 0
        self._keep = keep
        self._limit = _BATCHES * tasks_per_step
        self._in_a_row = 0

    def refuses(self, group: Group) -> bool:
        """Whether a group is not to be trained.

        Raises:
            ConfigurationError: So many groups were refused in a row that no batch may ever come together.
        """
        if self._keep is None or self._keep(group):
            self._in_a_row = 0
            return False
        self.refused += 1
        self._in_a_row += 1
        if self._in_a_row >= self._limit:
            raise ConfigurationError(
                f"group_filter refused {self._in_a_row} groups in a row, {_BATCHES} batches' worth, the last of task "
                f"{group.task_id!r}: give tasks that the policy solves now and then (more samples_per_task or a higher "
                "temperature help a little), or a group_filter that keeps more"
            )
        return True
