"""What a strategy goes through on a fake clock."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rft.experience import GroupKey
from lightning_rft.sync.schedule import Rule

__all__ = ["Crash", "Event"]


@dataclass(frozen=True)
class Event:
    """Something that happened under :func:`~lightning_rft.testing.drive`.

    Args:
        time: Seconds on the fake clock.
        what: ``"issued"``, ``"ready"``, ``"failed"`` or ``"dropped"`` (a group), ``"ended"`` (one of its samples),
            ``"joined"``, ``"loading"``, ``"loaded"`` or ``"died"`` (an explorer; ``"loading"`` only if it loads by
            itself), ``"training"`` or ``"trained"`` (a batch: its step begins or ends), ``"pushed"`` (a version, now
            loaded by every explorer or, if pushes happen in the background, about to be), ``"resumed"`` (a new run, to
            which all later events belong).
        version: The version that it happened with. For a group: the one that its explorer had loaded when it was
            issued, or from then on when the first of its samples began, wherever that was; for ``"trained"``: the
            batch, which is the version that it is trained by.
        group: The group, if it is about one.
        explorer: The explorer, if it is about one.
        groups: Those of the batch that is trained, or those that a resumed run starts with.
    """

    time: float
    what: str
    version: int
    group: GroupKey | None = None
    explorer: int | None = None
    groups: tuple[GroupKey, ...] = ()


@dataclass(frozen=True)
class Crash:
    """The trainer and all explorers die, and a new run resumes from a checkpoint.

    A checkpoint is taken after each step and its push. What explorers had brought back before the crash is used if the
    checkpoint includes its weights and it is not too old.

    Args:
        time: Seconds on the fake clock.
        back: How many checkpoints before the last one the new run resumes from.
        rule: Its strategy; ``None`` for the same.
    """

    time: float
    back: int = 0
    rule: Rule | None = None
