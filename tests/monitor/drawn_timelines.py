"""Hand-made timelines that look like the four drawings of synchronisation."""

from __future__ import annotations

import random

from lightning_rft.monitor.spans import Span

GROUPS = 4


class Story:
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.random = random.Random(0)

    def rollout(self, explorer: int, batch: int, begin: float, end: float) -> None:
        """Groups of a batch, issued at once, the longest of which takes until ``end``."""
        for group in range(GROUPS):
            done = end if group == 0 else begin + (end - begin) * self.random.uniform(0.5, 1.0)
            self.spans.append(Span(f"explorer {explorer}", "rollout", begin, done, batch=batch))
            self.spans.append(Span("buffer", "put", done, done + 0.0003, batch=batch))

    def train(self, batch: int, begin: float, end: float) -> None:
        self.spans.append(Span("trainer", "train", begin, end, batch=batch, version=batch))

    def weights(self, what: str, track: str, version: int, begin: float, end: float) -> None:
        self.spans.append(Span(track, what, begin, end, version=version))

    def sync(self, version: int, begin: float, end: float) -> None:
        for track in ("explorer 0", "trainer"):
            self.weights("sync", track, version, begin, end)

    def wait(self, track: str, cause: str, begin: float, end: float) -> None:
        if end > begin:
            self.spans.append(Span(track, "wait", begin, end, detail=cause))


def synchronous(k: int = 2, batches: int = 6) -> Story:
    story = Story()
    now = 0.5
    story.sync(0, 0.0, now)
    for first in range(0, batches, k):
        explored = now
        for batch in range(first, first + k):
            explored += 2.0
            story.rollout(0, batch, explored - 2.0, explored)
            story.wait("trainer", "experience", now, explored)
            now = max(now, explored) + 1.6
            story.train(batch, now - 1.6, now)
        story.wait("explorer 0", "weights", explored, now)
        story.sync(first + k, now, now + 0.5)
        now += 0.5
    return story


def one_step_off_policy(batches: int = 6) -> Story:
    story = Story()
    now = 0.5
    story.sync(0, 0.0, now)
    story.rollout(0, 0, now, now + 2.0)
    story.wait("trainer", "experience", now, now + 2.0)
    now += 2.0
    for batch in range(batches):
        explored, trained = now + story.random.uniform(1.0, 2.4), now + story.random.uniform(1.2, 2.0)
        if batch + 1 < batches:
            story.rollout(0, batch + 1, now, explored)
        else:
            explored = now
        story.train(batch, now, trained)
        story.wait("trainer", "push", trained, explored)
        story.wait("explorer 0", "weights", explored, trained)
        now = max(explored, trained)
        story.sync(batch + 1, now, now + 0.45)
        now += 0.45
    return story


def asynchronous(explorers: int = 1, batches: int = 12, seed: int = 0) -> Story:
    """Batches overlap on an explorer; checkpoints are written while training goes on."""
    story = Story()
    story.random.seed(seed)
    ready: dict[int, float] = {}
    free = [0.0] * explorers
    for batch in range(batches):
        explorer = batch % explorers
        begin = free[explorer]
        ready[batch] = begin + story.random.uniform(1.6, 2.6) * explorers**0.5
        story.rollout(explorer, batch, begin, ready[batch])
        free[explorer] = ready[batch] - story.random.uniform(0.0, 0.7)  # there is room before the longest is done
    now = 0.0
    for batch in range(batches):
        story.wait("trainer", "experience", now, ready[batch])
        now = max(now, ready[batch])
        story.train(batch, now, now + 1.5)
        now += 1.5
        if batch % 2:
            story.weights("write checkpoint", "trainer", batch + 1, now, now + 0.9)
            for explorer in range(explorers):
                begin = now + 0.95 + 0.5 * explorer
                if begin < max(ready.values()):
                    story.weights("load checkpoint", f"explorer {explorer}", batch + 1, begin, begin + 0.4)
    return story


STORIES = {
    "Synchronous": synchronous,
    "OneStepOffPolicy": one_step_off_policy,
    "FullyAsynchronous": asynchronous,
    "MultiExplorerAsynchronous": lambda: asynchronous(explorers=2, seed=1),
}
