"""What validation measures: estimates against enumeration, and the names under which they are logged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.rewards import last_number_or_text
from lightning_rft.trainer.evaluation import Evaluation, majority, mean_by_name, pass_at_k, sizes, task_scores
from lightning_rft.trainer.loader import BatchPart


def sample(text: str, reward: float, *, tokens: int = 2, cut: bool = False, version: int = 0) -> Experience:
    turn = Turn((1,), (2,) * tokens, (-0.5,) * tokens, (version,) * tokens, "length" if cut else "stop")
    return Experience("0", 0, (turn,), reward, text)


def scored(*experiences: Experience, samples: int) -> dict[str, float]:
    return task_scores(experiences, samples, pass_threshold=1.0, final_answer=last_number_or_text)


def test_parts_and_metrics_are_means_over_what_has_them() -> None:
    judged, silent = sample("4", 1.0), sample("5", 0.0)
    judged = replace(judged, rewards={"right": 1.0, "form": 0.5}, metrics={"calls": 2.0})
    silent = replace(silent, rewards={"right": 0.0})
    scores = scored(judged, silent, samples=2)
    expected = {"reward_right": 0.5, "reward_form": 0.5, "workflow_calls": 2.0}
    assert {name: scores[name] for name in expected} == expected
    assert mean_by_name([scores, scored(silent, samples=1)])["reward_right"] == 0.25  # each task counts alike
    assert not {"reward_form", "workflow_calls"} & scored(silent, samples=1).keys()


# Estimates


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_pass(passed: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(passed)))
    draws = [any(drawn) for drawn in combinations(passed, k)]
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(fmean(draws))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_is_unbiased(k: int) -> None:
    # over everything that four answers can be, which each pass with a chance of 0.3
    expected = 0.0
    for outcome in product([False, True], repeat=4):
        chance = 0.3 ** sum(outcome) * 0.7 ** (4 - sum(outcome))
        expected += chance * pass_at_k(4, sum(outcome), k)
    assert expected == pytest.approx(1 - 0.7**k)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=8))
def test_majority_is_the_expected_score_of_a_fair_vote(cast: list[tuple[int, float]]) -> None:
    votes = Counter(answer for answer, _ in cast)
    leading = [answer for answer in votes if votes[answer] == max(votes.values())]
    elected = [fmean(score for given, score in cast if given == answer) for answer in leading]
    assert majority([answer for answer, _ in cast], [score for _, score in cast]) == pytest.approx(fmean(elected))


@settings(max_examples=60)
@given(st.integers(1, 300))
def test_what_is_measured_are_the_powers_of_two_below_and_all(samples: int) -> None:
    assert sizes(samples) == sorted({2**power for power in range(9) if 2**power < samples} | {samples})


# A task


def test_scores_of_a_task() -> None:
    answers = [
        sample("It is 4.", 1.0, tokens=2, version=3),
        sample("= 4.0", 1.0, tokens=4, version=3),
        sample(" five ", 0.0, tokens=6, cut=True, version=3),
        sample("5", 0.5, tokens=8, version=3),
    ]
    assert scored(*answers, samples=4) == pytest.approx({
        "reward": 0.625,
        "pass_at_1": 0.5,
        "pass_at_2": 1 - 1 / 6,
        "pass_at_4": 1.0,
        "avg_at_4": 0.5,
        "maj_at_4": 1.0,
        "completion_length": 5.0,
        "truncated_share": 0.25,
        "version": 3.0,
    })  # fmt: skip


def test_one_sample_has_neither_average_nor_majority() -> None:
    assert list(scored(sample("4", 1.0), samples=1)) == [
        *("reward", "pass_at_1", "completion_length", "truncated_share", "version")
    ]


def test_fewer_answers_than_asked_for_estimate_only_what_they_can() -> None:
    left = scored(sample("4", 1.0), sample("4", 0.0), sample("5", 0.0), samples=4)
    assert {name: value for name, value in left.items() if "_at_" in name} == pytest.approx(
        {"pass_at_1": 1 / 3, "pass_at_2": 2 / 3}
    )
    assert scored(samples=4) == {}


@pytest.mark.parametrize(
    ("text", "equal"),
    [("so 1,200.50 it is", "1200.5"), ("I do not know ", "I do not know"), ("-3", "\N{MINUS SIGN}3"), ("", "  ")],
)
def test_the_final_answer_is_the_last_number_or_the_text(text: str, equal: str) -> None:
    assert last_number_or_text(text) == last_number_or_text(equal)
    assert last_number_or_text(text) != last_number_or_text("7")


def test_a_final_answer_that_cannot_be_counted() -> None:
    with pytest.raises(ConfigurationError, match=r"final_answer=.*returned a list .*unhashable"):
        task_scores([sample("4", 1.0)] * 2, 2, pass_threshold=1.0, final_answer=str.split)  # type: ignore[arg-type]


# Several tasks and sets


def part(val_set: str, *groups: list[Experience], samples: int = 1, last: bool = True, ends: bool = True) -> BatchPart:
    answers = [Group(GroupKey(-1, 0), "0", tuple(experiences)) for experiences in groups]
    return BatchPart(0, answers, part=0, parts=1 if last else 2, val_set=val_set, samples=samples, ends=ends)


def test_every_task_counts_once_however_many_of_its_samples_failed() -> None:
    evaluation = Evaluation("val", 1.0, last_number_or_text)
    assert evaluation.add(part("", [sample("4", 1.0)], samples=2, last=False, ends=False)) == {}
    metrics = evaluation.add(part("", [sample("5", 0.0)] * 2, [], samples=2))
    assert metrics["val/reward"] == metrics["val/pass_at_1"] == metrics["val/pass@1"] == 0.5
    assert metrics["val/pass_at_2"] == metrics["val/maj_at_2"] == 0.0  # of the only task with two answers


def test_sets_have_metrics_of_their_own_and_all_tasks_count_alike() -> None:
    evaluation = Evaluation("test", 1.0, last_number_or_text)
    assert evaluation.add(part("easy", [sample("4", 1.0)], last=False, ends=False)) == {}
    easy = evaluation.add(part("easy", [sample("4", 1.0)], ends=False))
    rest = evaluation.add(part("hard", *[[sample("4", 0.0)]] * 2))
    assert {name.rpartition("/")[0] for name in easy} == {"test/easy"}
    assert (easy["test/easy/reward"], rest["test/hard/reward"], rest["test/reward"]) == (1.0, 0.0, 0.5)
    assert rest["test/pass@1"] == 0.5
    folders = {name.rpartition("/")[0] for name in rest}
    assert folders == {"test", "test/hard"}
    assert not folders & {*easy, *rest}


def test_nothing_is_measured_where_all_samples_failed() -> None:
    assert Evaluation("val", 1.0, last_number_or_text).add(part("easy", [], samples=4)) == mean_by_name([]) == {}
