"""Several sources of tasks, mixed by weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Task
from lightning_rft.tasks.chance import draw
from lightning_rft.tasks.source import Lane, Source, lane_of, lists_of
from lightning_rft.tasks.sources import Tasks
from lightning_rft.tasks.task_set import TaskSet

__all__ = ["Mixture"]

_LONGEST = 100_000  # tasks until the pattern of a mixture begins anew


@dataclass(frozen=True, eq=False)
class Mixture:
    """Tasks of several sources, in proportions that hold exactly over any long stretch.

    Each source goes through its own tasks in its own order, each task once per pass. A task's id is
    ``<name of the source>/<id>``, and its ``metadata["source"]`` the name. An epoch is as many steps as it takes until
    every source has been gone through, in which smaller ones come several times; the next one goes on where it ended.

    Args:
        sources: Name -> :class:`TaskSet`, or what one is made of.
        weights: Name -> share of the tasks, relative to the others'; left out, all are equal.
        steps_per_epoch: Batches of an epoch; needed where a source has no length.

    Raises:
        ConfigurationError: There are no sources, a weight is missing, unknown or not above 0, or a source has
            ``steps_per_epoch`` of its own.

    Example::

        sources = {"sums": "sums.jsonl", "gsm8k": TaskSet("openai/gsm8k", name="main")}
        data = RFTDataModule(tasks=Mixture(sources, weights={"sums": 1, "gsm8k": 3}), reward=reward)
    """

    sources: dict[str, TaskSet | Tasks]
    weights: dict[str, float] | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigurationError("Mixture(sources={}) is empty: give at least one source")
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise ConfigurationError(f"Mixture(steps_per_epoch={self.steps_per_epoch}) must be at least 1")
        for name, source in self.sources.items():
            if isinstance(source, TaskSet) and source.steps_per_epoch is not None:
                raise ConfigurationError(f"Mixture: the epochs are its own, so leave steps_per_epoch of {name!r} out")
        self._whole_weights()

    @property
    def shuffle(self) -> bool:
        """Whether sources may shuffle."""
        return True

    @property
    def goes_on(self) -> bool:
        """Whether an epoch goes on where the last one ended."""
        return True

    def read(self) -> Source:
        """Reads all sources, or makes ready to.

        Raises :class:`ConfigurationError` as :meth:`TaskSet.read` does.
        """
        sets = {name: s if isinstance(s, TaskSet) else TaskSet(s) for name, s in self.sources.items()}
        parts = {name: (one.read(f"sources[{name!r}]", endless=True), one.shuffle) for name, one in sets.items()}
        mixed = _Mixed(parts, self._whole_weights())
        if mixed.epoch is None and self.steps_per_epoch is None:
            raise ConfigurationError("a source of Mixture has no length: set Mixture(steps_per_epoch=...)")
        return mixed

    def _whole_weights(self) -> dict[str, int]:
        weights = self.weights or dict.fromkeys(self.sources, 1)
        if weights.keys() != self.sources.keys() or not all(0 < weight < float("inf") for weight in weights.values()):
            raise ConfigurationError(
                f"Mixture(weights={weights}): give each of {', '.join(self.sources)} one weight above 0"
            )
        shares = {name: Fraction(str(weight)) for name, weight in weights.items()}
        scale = lcm(*(share.denominator for share in shares.values()))
        whole = {name: int(shares[name] * scale) for name in self.sources}
        common = gcd(*whole.values())
        if sum(whole.values()) // common > _LONGEST:
            raise ConfigurationError(
                f"Mixture(weights={weights}) repeats only after {sum(whole.values()) // common} tasks: round the "
                "weights, as to 1 and 3"
            )
        return {name: weight // common for name, weight in whole.items()}


class _Mixed(Source):
    """Sources, each with whether it may be shuffled, and their weights."""

    def __init__(self, parts: Mapping[str, tuple[Sequence[Task] | Source, bool]], weights: Mapping[str, int]) -> None:
        self._parts = parts
        self._weights = weights
        self.lists = [tasks for source, _ in parts.values() for tasks in lists_of(source)]
        lengths = {name: _length(source) for name, (source, _) in parts.items()}
        once = [n and -(-n * sum(weights.values()) // weights[name]) for name, n in lengths.items()]
        self.epoch = None if None in once else max(n for n in once if n is not None)

    @override
    def lane(self, shuffle: bool, seed: int) -> Lane:
        lanes = {
            name: lane_of(source, shuffle and shuffled, draw("source", seed, name))
            for name, (source, shuffled) in self._parts.items()
        }
        return _MixedLane(lanes, self._weights, seed)


class _MixedLane(Lane):
    """Sequences in turn: a pattern of names that is repeated, in which those of each are as far apart as they can be.

    A position of the whole and its place in the pattern say how many of each sequence came before.
    """

    def __init__(self, lanes: Mapping[str, Lane], weights: Mapping[str, int], seed: int) -> None:
        self._lanes = lanes
        self._weights = weights
        places = [
            (Fraction(2 * turn + 1, 2 * weight), draw("turn", seed, name), name)
            for name, weight in weights.items()
            for turn in range(weight)
        ]
        self._pattern = [name for _, _, name in sorted(places)]
        counts = dict.fromkeys(weights, 0)
        self._turns = []
        for name in self._pattern:
            self._turns.append(counts[name])
            counts[name] += 1
        self.words = "; ".join(f"{name!r} x {weights[name]}: {lane.words}" for name, lane in lanes.items())
        self.order = "; ".join(f"{name!r}: {lane.order}" for name, lane in lanes.items())

    @property
    @override
    def left_out(self) -> int:
        return sum(lane.left_out for lane in self._lanes.values())

    @override
    def number(self, position: int) -> int:
        lane, own, _ = self._place(position)
        return lane.number(own)

    @override
    def at(self, position: int) -> Task:
        lane, own, name = self._place(position)
        task = lane.at(own)
        return replace(task, id=f"{name}/{task.id}", metadata={**task.metadata, "source": name})

    @override
    def forget(self, before: int) -> None:
        for name, own in self._counts(before):
            self._lanes[name].forget(own)

    @override
    def learn(self, position: int, rewards: Sequence[float]) -> None:
        lane, own, _ = self._place(position)
        lane.learn(own, rewards)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: lane.state_dict() for name, lane in self._lanes.items()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, lane in self._lanes.items():
            lane.load_state_dict(state[name])

    def _place(self, position: int) -> tuple[Lane, int, str]:
        cycle, place = divmod(position, len(self._pattern))
        name = self._pattern[place]
        return self._lanes[name], cycle * self._weights[name] + self._turns[place], name

    def _counts(self, before: int) -> Iterator[tuple[str, int]]:
        """How many tasks of each sequence are before a position."""
        cycle, place = divmod(before, len(self._pattern))
        for name, weight in self._weights.items():
            yield name, cycle * weight + self._pattern[:place].count(name)


def _length(source: Sequence[Task] | Source) -> int | None:
    return len(source) if isinstance(source, Sequence) else source.epoch
