"""Every strategy with either transport: whole runs with real processes, and an engine that computes nothing."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

import lightning_rft as rft
from lightning_rft.explorer.engines.requests import Completion
from lightning_rft.monitor.spans import Span
from tests.processes import LightEngine
from tests.trainer_and_data import SUMS, fake_data, pool_of, quiet_trainer

STEPS = 8  # of 4, 4 and 2 groups in turn: two epochs and most of a third

STRATEGIES = {
    "a": (rft.Synchronous, {}),
    "a, k=2": (rft.Synchronous, {"sync_interval": 2}),
    "b": (rft.OneStepOffPolicy, {}),
    "b, in flight": (rft.OneStepOffPolicy, {"in_flight": True}),
    "c": (rft.FullyAsynchronous, {}),
    "c, drained": (rft.FullyAsynchronous, {"sync_interval": 2, "max_staleness": 1, "in_flight": False}),
    "c, drop": (rft.FullyAsynchronous, {"max_staleness": 1, "overdue": "drop"}),
    "d": (rft.MultiExplorerAsynchronous, {}),
    "d, on policy": (rft.MultiExplorerAsynchronous, {"max_staleness": 0}),
}
TRANSPORTS: dict[str, Any] = {
    "collective": rft.CollectiveTransport,
    "checkpoint": rft.CheckpointTransport,
    "blocking": lambda: rft.CollectiveTransport(background="blocking"),
}
WHOLE_RUNS = [
    (name, transport)
    for name in STRATEGIES
    for transport in TRANSPORTS
    if transport != "blocking" or name in ("c", "c, drained", "d")
]


pytestmark = pytest.mark.usefixtures("one_thread")


def make_data(**changes: Any) -> rft.RFTDataModule:
    settings: dict[str, Any] = {
        "engine": LightEngine(tokens_per_second=300.0, mean_tokens=6),
        "explorers": 2,
        "max_new_tokens": 40,
        "val_tasks": SUMS[:3],
    }
    return fake_data(**settings | changes)


@pytest.fixture(scope="module")
def data() -> Iterator[rft.RFTDataModule]:
    with make_data() as data:
        yield data


def fit(strategy: rft.SyncStrategy, data: rft.RFTDataModule, model: Path, folder: Path, **changes: Any) -> L.Trainer:
    trainer = quiet_trainer(folder, *changes.pop("callbacks", [strategy]), **{"max_steps": STEPS} | changes)
    trainer.fit(rft.RFTModule(model), data)
    return trainer


def sql(folder: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(folder / "rft" / "buffer.sqlite")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize(("name", "transport"), WHOLE_RUNS)
def test_every_strategy_with_every_transport(
    name: str, transport: str, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    make, settings = STRATEGIES[name]
    strategy = make(transport=TRANSPORTS[transport](), **settings)
    timeline = rft.TimelineCallback()
    trainer = fit(strategy, data, tiny_model_path, tmp_path, callbacks=[timeline, strategy])
    assert trainer.global_step == STEPS

    # every task once per epoch; groups of batches that will not be are not begun
    rows = sql(tmp_path, "SELECT epoch, task_id, batch, step, oldest_version FROM groups WHERE state = 'trained'")
    trained = Counter((epoch, task) for epoch, task, *_ in rows)
    assert set(trained.values()) == {1}
    assert Counter(epoch for epoch, _ in trained) == {0: 10, 1: 10, 2: 8}
    assert sql(tmp_path, "SELECT DISTINCT state FROM groups") == [("trained",)]
    assert Counter(step for *_, step, _ in rows) == {0: 4, 1: 4, 2: 2, 3: 4, 4: 4, 5: 2, 6: 4, 7: 4}
    assert all(0 <= step - version <= strategy.max_staleness for *_, step, version in rows)
    if not strategy.asynchronous:
        assert all(batch == step for _, _, batch, step, _ in rows)
        if not strategy.in_flight:
            assert all(version == strategy.admit(batch) for _, _, batch, _, version in rows)

    check_timeline(strategy, timeline.spans, transport)
    assert json.loads((tmp_path / "rft" / "timeline.json").read_text())["traceEvents"]
    assert (tmp_path / "rft" / "timeline.png").stat().st_size > 10_000


def check_timeline(strategy: rft.SyncStrategy, spans: Sequence[Span], transport: str) -> None:
    """What everyone did is what the strategy's drawing says."""
    assert {span.track for span in spans} == {"trainer", "buffer", "explorer 0", "explorer 1"}
    assert all(span.begin <= span.end for span in spans)
    of: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.begin):
        of.setdefault(span.what, []).append(span)
    assert [train.batch for train in of["train"]] == list(range(STEPS))
    assert len(of["rollout"]) == len(of["put"]) == 28
    loads = of["load checkpoint" if transport == "checkpoint" else "load"]
    assert ("write checkpoint" in of) == (transport == "checkpoint")
    ends = {train.batch: train.end for train in of["train"]}
    if isinstance(strategy, rft.Synchronous) and strategy.sync_interval == 1:
        assert not any(overlap(rollout, train) for rollout in of["rollout"] for train in of["train"])
    if isinstance(strategy, rft.OneStepOffPolicy):
        ahead = [(r, t) for r in of["rollout"] for t in of["train"] if r.batch == t.batch + 1 and overlap(r, t)]
        assert ahead
        assert all(r.begin >= ends[r.batch - 2] for r in of["rollout"] if r.batch >= 2)
    if transport == "blocking":
        assert {"sync"} == {span.what for span in spans if span.track == "trainer"} - {"train", "wait"}
        assert not any(overlap(load, train) for load in loads for train in of["train"])
    elif strategy.asynchronous:
        waits = [span for span in spans if span.track == "trainer" and span.what in ("wait", "sync")]
        assert {span.detail for span in waits} <= {"experience"}  # never for a push
    if strategy.loading < 1:
        assert not any(overlap(one, other) for one, other in pairwise(loads))  # never all of them


def overlap(one: Span, other: Span) -> bool:
    return one.begin < other.end and other.begin < one.end


def test_validation_uses_what_is_loaded_and_the_last_version_arrives(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    trainer = fit(
        rft.FullyAsynchronous(max_staleness=1),
        data,
        tiny_model_path,
        tmp_path,
        logger=logger,
        limit_val_batches=1,
        val_check_interval=2,
        max_steps=6,
    )
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [
            (int(row["step"]) + 1, float(row["val/version"])) for row in csv.DictReader(file) if row["val/version"]
        ]
    assert [step for step, _ in logged] == [2, 5]
    assert all(0 <= version <= step for step, version in logged)
    validated = trainer.validate(trainer.lightning_module, data, verbose=False)
    assert validated[0]["val/version"] == 6


def test_waits_and_drops_are_logged(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(rft.FullyAsynchronous(), data, tiny_model_path, tmp_path, logger=logger)
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    for name in ("wait_weights", "wait_room", "explore", "load"):
        assert f"rft/explorer_{name}_s" in text
    assert "rft/dropped_groups" in text and "rft/wait_push_s" in text


def liar(*, always: bool) -> LightEngine:
    """Says of tokens that it samples with version 3 that they are of version 0: once, or always."""

    class Liar(LightEngine):  # not at the top of the file: an explorer would import all of it
        told = False

        def step(self) -> list[Completion]:
            finished = super().step()
            if not finished or self.version != 3 or (self.told and not always):
                return finished
            self.told = True
            first = finished[0]
            versions = (0,) * len(first.versions)
            lie = Completion(first.request_id, first.token_ids, first.logprobs, versions, first.finish_reason)
            return [lie, *finished[1:]]

    return Liar(mean_tokens=4)


@pytest.mark.parametrize("strategy", [rft.Synchronous, rft.FullyAsynchronous])
def test_what_is_too_stale_is_dropped_counted_and_explored_again(
    strategy: type[rft.SyncStrategy], tiny_model_path: Path, tmp_path: Path
) -> None:
    data = make_data(engine=liar(always=False), explorers=1)
    trainer = fit(strategy(), data, tiny_model_path, tmp_path)
    assert trainer.global_step == STEPS
    assert trainer.callback_metrics["rft/dropped_groups"] == 1
    rows = sql(tmp_path, "SELECT step, oldest_version, attempts FROM groups")
    assert sorted(attempts for *_, attempts in rows) == [1] * (len(rows) - 1) + [2]
    assert all(0 <= step - version <= strategy().max_staleness for step, version, _ in rows)


def test_an_engine_that_never_computes_with_new_weights_ends_the_run(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(rft.ScheduleError, match=r"version 0 for batch 3 again and again, .* staleness of 0"):
        fit(rft.Synchronous(), make_data(engine=liar(always=True), explorers=1), tiny_model_path, tmp_path)


class Torn(rft.CheckpointTransport):
    """Cuts off the end of every version but the first two after it was written."""

    def prepare(self, weights: Any, version: int, explorers: Any) -> None:
        super().prepare(weights, version, explorers)
        if version >= 2:
            path = Path(self._written[version][0].path)
            path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("strategy", [rft.Synchronous, rft.FullyAsynchronous])
def test_a_torn_checkpoint_ends_the_run(
    strategy: type[rft.SyncStrategy], tiny_model_path: Path, tmp_path: Path
) -> None:
    data = make_data(explorers=1)
    with pytest.raises(rft.TransportError, match=r"torn or missing .* not loaded"):
        fit(strategy(transport=Torn()), data, tiny_model_path, tmp_path)
    assert not pool_of(data).running


def test_checkpoints_are_kept_as_asked(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    fit(rft.Synchronous(transport=rft.CheckpointTransport()), data, tiny_model_path, tmp_path / "run")
    assert not (tmp_path / "run" / "rft" / "weights").exists()
    kept = tmp_path / "kept"
    fit(rft.Synchronous(transport=rft.CheckpointTransport(kept, keep=3)), data, tiny_model_path, tmp_path / "other")
    (run,) = kept.iterdir()
    assert sorted(version.name for version in run.iterdir()) == [f"version-0000000{number}" for number in (6, 7, 8)]
