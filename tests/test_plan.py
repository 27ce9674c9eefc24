"""``lightning-rft plan``: closed forms, bounds, what it recommends, and the command with and without a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import lightning_rft as rft
from lightning_rft.plan.advice import recommendation, recommended
from lightning_rft.plan.figures import Case, Figures, cases
from lightning_rft.plan.measure import sample_seconds
from lightning_rft.plan.planner import Row, plan
from tests.test_evaluate import run_command

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = ["--plan.train_s", "4", "--plan.explore_s", "6", "--plan.push_s", "0.5"]
SMALL = [
    "--plan.tasks_per_step",
    "2",
    "--plan.samples_per_task",
    "2",
    "--plan.bounds",
    "[2]",
    "--plan.intervals",
    "[1]",
]


def figures(train_s: float, explore_s: float, push_s: float, **changes: Any) -> Figures:
    defaults = {"load_s": push_s, "sample_s": [[explore_s] * 2], "tasks_per_step": 2, "at_once": 4}
    return Figures(train_s=train_s, push_s=push_s, **defaults | changes)


def row(given: Figures, rule: rft.SyncStrategy, explorers: int = 1) -> Row:
    (found,) = plan(given, [Case(rule, explorers)])
    return found


seconds = st.sampled_from([0.5, 1.0, 2.0, 3.25, 8.0])


@settings(max_examples=15, deadline=None)
@given(train=seconds, explore=seconds, push=st.sampled_from([0.0, 0.25, 1.0]))
def test_closed_forms(train: float, explore: float, push: float) -> None:
    one = figures(train, explore, push)
    on_policy = row(one, rft.Synchronous())
    assert on_policy.step_s == pytest.approx(train + explore + push)
    assert on_policy.trainer_idle == pytest.approx(explore / on_policy.step_s)
    assert on_policy.explorer_idle == pytest.approx(train / on_policy.step_s)
    assert on_policy.staleness_max == 0
    # the second batch of a pair is explored while the first is trained
    pairs = row(one, rft.Synchronous(2))
    assert pairs.step_s == pytest.approx((explore + max(explore, train) + train + push) / 2)
    assert (pairs.staleness_mean, pairs.staleness_max) == (0.5, 1)
    ahead = row(one, rft.OneStepOffPolicy())
    assert ahead.step_s == pytest.approx(max(train, explore) + push)
    assert ahead.trainer_idle == pytest.approx(max(0.0, explore - train) / ahead.step_s)
    assert (ahead.staleness_mean, ahead.staleness_max) == (1.0, 1)


def test_fully_asynchronous_waits_for_no_push_but_explorers_load() -> None:
    train_bound = row(figures(6.0, 4.0, 0.5), rft.FullyAsynchronous(max_staleness=4))
    assert train_bound.step_s == pytest.approx(6.0)
    assert train_bound.trainer_idle == pytest.approx(0.0)
    explore_bound = row(figures(4.0, 6.0, 0.5), rft.FullyAsynchronous(max_staleness=4))
    assert explore_bound.step_s == pytest.approx(6.0 + 0.5)
    without = row(figures(4.0, 6.0, 0.5, load_s=0.0), rft.FullyAsynchronous(max_staleness=4))
    assert without.step_s == pytest.approx(6.0)


def test_a_second_explorer_takes_half_of_the_work() -> None:
    one = figures(1.0, 6.0, 0.25, at_once=2)  # half of a step at a time
    alone = row(one, rft.FullyAsynchronous(max_staleness=4))
    assert alone.step_s == pytest.approx(12.25, rel=0.05)
    assert row(one, rft.MultiExplorerAsynchronous(max_staleness=4), 2).step_s == pytest.approx(6.25, rel=0.05)


@settings(max_examples=10, deadline=None)
@given(train=seconds, push=st.sampled_from([0.0, 0.25, 1.0]), lengths=st.lists(seconds, min_size=4, max_size=4))
def test_no_strategy_beats_its_slower_side(train: float, push: float, lengths: list[float]) -> None:
    one = figures(train, 0.0, push, sample_s=[lengths[:2], lengths[2:]], at_once=2)
    work = sum(lengths) / 2  # of an explorer with two places
    for found in plan(one, cases([1], [1, 2], [2])):
        rule = found.case.rule
        assert found.step_s >= max(train, 0.95 * work)
        assert found.staleness_mean <= found.staleness_max <= rule.max_staleness
        assert 0 <= found.trainer_idle <= 1 - train / found.step_s + 1e-9
        assert 0 <= found.explorer_idle < 1


def test_what_is_recommended() -> None:
    balanced = figures(4.0, 6.0, 0.5)
    rows = plan(balanced, cases([1], [1], [1, 2]))
    assert recommended(rows, 0.1).case.name == "OneStepOffPolicy(sync_interval=1)"
    said = recommendation(balanced, rows, 0.1)
    assert said.startswith("Use OneStepOffPolicy(sync_interval=1): 6.50 s a step instead of 10.50 s, 38% less, since ")
    lopsided = figures(9.0, 0.5, 0.0)
    rows = plan(lopsided, cases([1], [1], [1, 2]))
    assert isinstance(recommended(rows, 0.1).case.rule, rft.Synchronous)
    said = recommendation(lopsided, rows, 0.1)
    assert said.startswith("Nothing is recommended over Synchronous(sync_interval=1), 9.50 s a step: ")
    assert said.endswith("would save 5%, and the threshold is 10%.")
    assert recommended(rows, 0.05).case.name == "OneStepOffPolicy(sync_interval=1)"


def test_samples_take_what_their_tokens_say_and_a_batch_what_was_measured() -> None:
    tokens = [[10, 20], [40, 10], [5, 5], [20, 10]]  # two batches, whose longest samples have 40 and 20
    found = sample_seconds(tokens, 3.0, tasks_per_step=2, explorers=1, at_once=4)
    assert found == [[pytest.approx(0.1 * count) for count in group] for group in tokens]
    again = row(figures(1.0, 0.0, 0.25, sample_s=found), rft.Synchronous())
    assert again.step_s == pytest.approx(3.0 + 1.25)


def test_cases_are_those_that_can_work() -> None:
    names = {case.name for case in cases([1], [1, 4], [2])}
    assert "FullyAsynchronous(sync_interval=1, max_staleness=2)" in names
    assert not any("sync_interval=4, max_staleness=2" in name or "Multi" in name for name in names)
    assert any("Multi" in case.name for case in cases([2], [1], [2]))


def test_figures_need_no_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    run_command("plan", *GIVEN, *SMALL, "--plan.picture", str(picture), "--plan.explorers", "[1, 2]")
    said = capsys.readouterr().out
    assert re.search(r"^OneStepOffPolicy\(sync_interval=1\) +1 +6.50 +31% +0% +1.0 +1$", said, re.MULTILINE)
    assert re.search(r"^MultiExplorerAsynchronous\(sync_interval=1, max_staleness=2\) +2 ", said, re.MULTILINE)
    assert "With 1 explorer: Use OneStepOffPolicy" in said and "With 2 explorers: Use " in said
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan.train_s", "4"], "give --plan.explore_s, --plan.push_s, or a --config to measure with"),
        ([*GIVEN, "--plan.push_s", "-1"], "push_s=-1.0 must be at least 0"),
        ([*GIVEN, "--plan.explorers", "[0]"], "explorers=0 must be at least 1"),
        ([*GIVEN, "--plan.threshold", "1"], "threshold=1.0 must be at least 0 and below 1"),
        ([*GIVEN, "--plan.bounds", "[]"], "bounds=[] leaves nothing to compare"),
        ([*GIVEN, "--plan.intervals", "[0]"], "sync_interval=0 must be at least 1"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        run_command("plan", *options)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_is_measured(capsys: pytest.CaptureFixture[str], tiny_model_path: Path, tmp_path: Path) -> None:
    config = {
        "model": {"model": str(tiny_model_path)},
        "data": {
            "tasks": [{"prompt": f"{index} + 1 =", "answer": index + 1} for index in range(6)],
            "reward": "lightning_rft.rewards.last_number",
            "engine": {"class_path": "tests.processes.LightEngine", "init_args": {"tokens_per_second": 50.0}},
            "tasks_per_step": 2,
            "samples_per_task": 2,
            "max_new_tokens": 6,
            "buffer": str(tmp_path / "kept.sqlite"),
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "callbacks": [{"class_path": "FullyAsynchronous"}],
            "default_root_dir": str(tmp_path),
        },
    }
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(config))
    options = ["--plan.seconds", "0", "--plan.bounds", "[2]", "--plan.picture", "null", "--plan.train_s", "30"]
    run_command("plan", "--config", str(path), *options)
    said = capsys.readouterr().out
    found = re.search(r"Measured: (\d+\.\d+) s to explore a batch, \d+\.\d+ s for the rest of a step, ", said)
    assert found and float(found[1]) > 0
    on_policy = re.search(r"^Synchronous\(sync_interval=1\) +1 +(\d+\.\d+) ", said, re.MULTILINE)
    assert on_policy and float(on_policy[1]) > 30  # what was given counts
    assert [file.name for file in tmp_path.iterdir()] == ["given.yaml"]
