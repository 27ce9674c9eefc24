"""What grows with the number of steps, of explorers and of stored groups, and what does not.

    python -m benchmarks.scale                     # everything
    python -m benchmarks.scale steps simulated     # some of it

``steps``: 100,000 steps through the dispatcher of rank 0 in one process, with its schedule, roster, ledger and tasks,
and explorers that answer at once (2 explorers, a group of 2 samples a step; some groups fail, and explorers die):
processor time per event, memory and size of the file over the thousand steps that end at 1, 10 and 100 thousand.
``explorers``: a whole run with 16 explorer processes whose engines compute nothing. ``simulated``: seconds a step of 64
explorers on a fake clock, by how many of them load at the same time. ``stored``: training from 800,000 stored groups.
Writes ``benchmarks/results/scale.json``; what is not measured stays as it was there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.buffer.reader import StoredExperience
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.monitor.spans import Span
from lightning_rft.testing import drive, tiny_model
from tests.processes import LightEngine, share_of_letters
from tests.run.rank_zero import RankZero

RESULTS = Path(__file__).parent / "results"
MARKS = 1_000, 10_000, 100_000
WINDOW = 1_000  # steps before a mark over which times are taken
KEEP = 100
EXPLORERS, STEPS = 16, 3_000
STORED = 800_000


def rss_mib(pid: int | str = "self") -> float:
    """Memory of a process that is its own or shared and in use."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def file_mib(path: Path) -> float:
    """Size of a buffer, its log included."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 2**20


def many_steps() -> dict[str, Any]:
    """In one process, with a buffer that is pruned; and for its size without pruning, fewer."""
    found: dict[str, Any] = {"keep": KEEP}
    for name, keep, marks in (("pruned", KEEP, MARKS), ("whole", None, MARKS[:2])):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "buffer.sqlite"
            strategy = rft.MultiExplorerAsynchronous(max_staleness=3)
            with RankZero(strategy, path, explorers=2, groups=1, keep=keep) as run:
                found[name] = {}
                for mark in marks:
                    found[name][str(mark)] = up_to(mark, run, path)
                    print(name, mark, found[name][str(mark)], flush=True)
    return found


def up_to(mark: int, run: RankZero, path: Path) -> dict[str, float]:
    """Trains up to a step, and measures over the last of them."""
    while run.dispatcher.schedule.version < mark - WINDOW:
        run.step()
    began, events = time.process_time(), run.events
    for _ in range(WINDOW):
        run.step()
    seconds, events = time.process_time() - began, run.events - events
    return {
        "us_per_event": round(1e6 * seconds / events, 1),
        "events_per_step": events / WINDOW,
        "rss_mib": round(rss_mib(), 1),
        "file_mib": round(file_mib(path), 2),
    }


class Watch(L.Callback):
    """Looks at time and memory at some steps."""

    def __init__(self, data: rft.RFTDataModule, path: Path, marks: tuple[int, ...]) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.loads: list[tuple[float, float]] = []
        self._data, self._path, self._marks = data, path, marks
        self._last = 0, time.monotonic()
        data.observers.append(self.observe)

    def observe(self, span: Span) -> None:
        """Keeps when explorers loaded."""
        if span.what == "load checkpoint":
            self.loads.append((span.begin, span.end))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Measures."""
        step = trainer.global_step
        if step in self._marks:
            before, since = self._last
            self._last = step, time.monotonic()
            pool = self._data._pool
            self.found[str(step)] = {
                "s_per_step": round((self._last[1] - since) / (step - before), 4),
                "trainer_rss_mib": round(rss_mib(), 1),
                "largest_explorer_rss_mib": round(max(rss_mib(pool.pid(index)) for index in pool.up), 1),
                "file_mib": round(file_mib(self._path), 2),
            }


def many_explorers(steps: int) -> dict[str, Any]:
    """Processes, whose engines sample at once what follows from a seed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "buffer.sqlite"
        data = rft.RFTDataModule(
            tasks=[f"{index} + 1 =" for index in range(64)],
            reward=share_of_letters,
            engine=LightEngine(mean_tokens=4),
            explorers=EXPLORERS,
            tasks_per_step=8,
            samples_per_task=2,
            max_new_tokens=6,
            buffer=rft.Buffer(path, keep=KEEP),
        )
        watch = Watch(data, path, (steps // 30, steps // 3, steps))
        L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[rft.MultiExplorerAsynchronous(sync_interval=4, max_staleness=8), watch],
            logger=False,
            limit_val_batches=0,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(rft.RFTModule(tiny_model(Path(folder) / "tiny")), data)
    return {"explorers": EXPLORERS, "steps": steps, "loading_at_once": at_once(watch.loads), **watch.found}


def at_once(spans: list[tuple[float, float]]) -> int:
    """The largest number of spans at the same time."""
    most = now = 0
    for _, change in sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans]):
        now += change
        most = max(most, now)
    return most


def simulated() -> dict[str, Any]:
    """64 explorers with room for two answers each; a step takes 5 s, an answer 5 to 15 s, a load 1 or 2 s."""
    rules: dict[str, rft.SyncStrategy] = {
        "one at a time": rft.MultiExplorerAsynchronous(max_staleness=2, loading=1 / 64),
        "a quarter": rft.MultiExplorerAsynchronous(max_staleness=2),
        "a half": rft.MultiExplorerAsynchronous(max_staleness=2, loading=0.5),
        "all (FullyAsynchronous)": rft.FullyAsynchronous(max_staleness=2),
    }
    return {
        f"load {load_s:g} s": {name: seconds_per_step(rule, load_s) for name, rule in rules.items()}
        for load_s in (1.0, 2.0)
    }


def seconds_per_step(rule: rft.SyncStrategy, load_s: float) -> float:
    """Once the run is even."""
    lengths = random.Random(0)
    events = drive(
        rule,
        batches=20,
        groups_per_batch=64,
        explorers=64,
        duration=lambda group, attempt: lengths.uniform(5.0, 15.0),
        train_time=5.0,
        push_time=0.5,
        load_time=load_s,
        room=2,
    )
    begins = [event.time for event in events if event.what == "training"]
    return round((begins[17] - begins[5]) / 12, 2)


def stored() -> dict[str, float]:
    """Processor time until training can start, and of a batch, of groups of one short sample."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "buffer.sqlite"
        fill(path)
        began = time.process_time()
        source = StoredExperience(path, tasks_per_step=8, shuffle=True, seed=0, version=lambda: 0)
        start = time.process_time() - began
        assert source.batches == STORED // 8
        first, later = timed(lambda: source.wanted(0), 1), timed(lambda: source.wanted(1), 100)

        def shuffle() -> None:
            random.Random("0 0").shuffle(list(range(STORED)))

        return {
            "groups": STORED,
            "start_s": round(start, 2),
            "first_batch_of_an_epoch_ms": round(first, 2),
            "batch_ms": round(later, 2),
            "batch_ms_when_all_keys_are_shuffled_for_it": round(later + timed(shuffle, 5), 2),
        }


def fill(path: Path) -> None:
    """Stores one group, and copies of it."""
    turn = Turn((1, 2), (3, 4), (-0.5, -0.25), (0, 0), "stop")
    with Ledger.open(path) as ledger:
        ledger.begin()
        ledger.issue(GroupKey(0, 0), "task", 0, 0)
        ledger.ready(Group(GroupKey(0, 0), "task", (Experience("task", 0, (turn,), 1.0),)))
    with closing(sqlite3.connect(path)) as connection:
        for table in ("groups", "experiences"):
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            values = ", ".join({"batch": "i / 8", "slot": "i % 8"}.get(name, name) for name in names)
            connection.execute(
                f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {STORED})"
                f" INSERT INTO {table} SELECT {values} FROM n, {table} WHERE batch = 0 AND slot = 0"
            )
        connection.commit()


def timed(call: Callable[[], Any], times: int) -> float:
    """Milliseconds of processor time that a call takes."""
    began = time.process_time()
    for _ in range(times):
        call()
    return 1e3 * (time.process_time() - began) / times


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("steps", "explorers", "simulated", "stored")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; left out, all")
    parser.add_argument("--explorer-steps", type=int, default=STEPS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning_rft").setLevel(logging.ERROR)  # deaths and failures are made here
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "scale.json"
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "steps": many_steps,
        "explorers": lambda: many_explorers(given.explorer_steps),
        "simulated": simulated,
        "stored": stored,
    }
    for part in given.parts or parts:
        found = measures[part]()
        print(part, json.dumps(found, indent=1), flush=True)
        results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(results | {part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
