"""What a run's buffer tells: the fate of every group, curves over the batches, samples and failures."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any

from lightning_rft.buffer.reader import read_buffer, read_prompts
from lightning_rft.monitor.scores import Scored, score_metrics
from lightning_rft.monitor.texts import shortened

__all__ = ["Stored", "add_prompts"]

_KEY = ("run", "batch", "slot", "round")
_MOST_CHARACTERS = 2000  # of a text
_MOST_FAILURES = 300

_Row = Mapping[str, Any]


class Stored:
    """Takes in the rows of a buffer, one after another, and keeps at most ``most_samples`` samples of them."""

    def __init__(self, rows: Iterable[_Row], most_samples: int) -> None:
        #: Number of groups in each state.
        self.states: Counter[str] = Counter()
        #: Failed groups, at most a few hundred.
        self.failures: list[dict[str, Any]] = []
        self.total_samples = self.total_tokens = 0
        self._most_samples = most_samples
        self._trained: dict[tuple[int, int], list[list[Scored]]] = defaultdict(list)  # by run and step
        self._oldest: dict[tuple[int, int], int] = {}
        self._kept: list[tuple[int, list[dict[str, Any]]]] = []  # groups, with their index among all
        self._stride = 1
        self._groups = 0
        for _, group in groupby(rows, key=itemgetter(*_KEY)):
            self._take(list(group))

    @classmethod
    def read(cls, path: Path, most_samples: int) -> Stored:
        """Reads a file, also one that a run is writing."""
        return cls(read_buffer(path, tokens=False), most_samples)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The samples that are kept, of groups spread evenly over all."""
        return [sample for _, group in self._kept for sample in group]

    def curves(self) -> dict[str, dict[int, list[tuple[int, float]]]]:
        """Step and value of each metric of trained batches that scores and lengths give, by name and run."""
        found: dict[str, dict[int, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
        for (run, step), groups in sorted(self._trained.items()):
            values = score_metrics(groups) | {"rft/staleness_max": float(step - self._oldest[run, step])}
            for name, value in values.items():
                if isfinite(value):
                    found[name][run].append((step, value))
        return found

    def _take(self, rows: list[_Row]) -> None:
        first = rows[0]
        self.states[first["state"]] += 1
        if first["state"] == "failed" and len(self.failures) < _MOST_FAILURES:
            names = ("run", "batch", "task_id", "step", "attempts")
            self.failures.append({name: first[name] for name in names} | {"error": _short(first["error"])})
        if first["sample"] is None:
            return
        self.total_samples += len(rows)
        self.total_tokens += sum(row["num_tokens"] for row in rows)
        if first["state"] == "trained":
            key = first["run"], first["step"]
            self._trained[key].append([_scored(row) for row in rows])
            self._oldest[key] = min(*(row["oldest_version"] for row in rows), self._oldest.get(key, first["step"]))
        if self._groups % self._stride == 0:
            self._kept.append((self._groups, [_sample(row) for row in rows]))
        self._groups += 1
        while len(self._kept) > 1 and sum(len(group) for _, group in self._kept) > self._most_samples:
            self._stride *= 2
            self._kept = [(index, group) for index, group in self._kept if index % self._stride == 0]


def add_prompts(samples: Sequence[dict[str, Any]], path: Path, tokenizer: Any) -> list[str]:
    """Gives each sample the index of its ``prompt`` in the list of texts that is returned, or None."""
    indices: dict[str, int] = {}
    for sample, ids in zip(samples, read_prompts(path, _keys(samples)), strict=True):
        text = None if ids is None else _short(tokenizer.decode(ids, skip_special_tokens=False))
        sample["prompt"] = None if text is None else indices.setdefault(text, len(indices))
    return list(indices)


def _keys(samples: Iterable[_Row]) -> Iterator[tuple[int, ...]]:
    return (tuple(sample[name] for name in (*_KEY, "sample")) for sample in samples)


def _scored(row: _Row) -> Scored:
    return Scored(
        row["reward"], _numbers(row["rewards"]), row["num_tokens"], row["finish_reason"], _numbers(row["metrics"])
    )


def _sample(row: _Row) -> dict[str, Any]:
    names = (*_KEY, "task_id", "state", "step", "sample", "reward", "num_tokens", "finish_reason")
    return {name: row[name] for name in names} | {
        "rewards": _numbers(row["rewards"]),
        "oldest": row["oldest_version"],
        "newest": row["newest_version"],
        "text": _short(row["text"]),
    }


def _numbers(text: str) -> dict[str, float]:
    return {} if text == "{}" else json.loads(text)


def _short(text: str | None) -> str:
    return shortened(text or "", _MOST_CHARACTERS)
