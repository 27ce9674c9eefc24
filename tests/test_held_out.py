"""Sets of held-out tasks by name, and what is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lightning_rft as rft
from lightning_rft.tasks.held_out import read_sets


def prompts(given: Any) -> dict[str, list[Any]]:
    return {name: [task.prompt for task in tasks] for name, tasks in read_sets(given).items()}


def test_sets_by_name(tmp_path: Path) -> None:
    file = tmp_path / "hard.jsonl"
    file.write_text(json.dumps({"prompt": "c"}) + "\n")
    sets = {"easy": ["a", rft.Task("b")], "hard": str(file), "table": {"question": ["d", "e"], "answer": [1, 2]}}
    assert prompts(sets) == {"easy": ["a", "b"], "hard": ["c"], "table": ["d", "e"]}


@pytest.mark.parametrize("given", [["a", "b"], {"prompt": ["a", "b"]}, {"question": ["a", "b"], "answer": [1, 2]}])
def test_a_single_set(given: Any) -> None:
    assert prompts(given) == {"": ["a", "b"]}
    assert prompts({"all": given}) == {"all": ["a", "b"]}


def test_none() -> None:
    assert read_sets(None) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "val_tasks is empty|val_tasks is a dict"),
        ({"easy": []}, r"val_tasks\['easy'\] is empty"),
        ({"easy": [3]}, r"val_tasks\['easy'\]\[0\] is a int"),
        ({"easy": 3}, r"val_tasks\['easy'\] is a int"),
        ({"prompt": "p"}, "val_tasks is a dict: give a list of tasks, even for a single one"),
        ({"prompt": ["p"], "answer": [1, 2]}, "columns that are equally long"),
        ({"a/b": ["p"]}, r"set named 'a/b': name it with letters, digits, '_', '-' and '\.'"),
        ({"": ["p"]}, "set named ''"),
        ({"..": ["p"]}, r"set named '\.\.'"),
        ({3: ["p"]}, "set named 3"),
        *(
            ({name: ["p"]}, f"set named '{name}', as is a metric: give it another name")
            for name in ("reward", "version", "pass_at_4", "maj_at_16", "truncated_share")
        ),
    ],
)
def test_what_is_refused(given: Any, message: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=message):
        read_sets(given)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 0.0),
        ({"val_samples": 4}, 0.7),
        ({"val_samples": 4, "val_sampling": rft.Sampling(temperature=0.5)}, 0.5),
        ({"val_sampling": rft.Sampling(temperature=0.5)}, 0.5),
    ],
)
def test_several_samples_are_not_greedy(settings: dict[str, Any], temperature: float) -> None:
    data = rft.RFTDataModule(
        ["a"], lambda text, task: 0.0, val_tasks=["b"], sampling=rft.Sampling(temperature=0.7, seed=3), **settings
    )
    assert data.val_sampling == rft.Sampling(256, temperature, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_samples": 0}, "val_samples=0 must be at least 1"),
        ({"val_samples": 2, "val_sampling": rft.Sampling(temperature=0)}, "val_samples=2 with .* all answers are eq"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(rft.ConfigurationError, match=message):
        rft.RFTDataModule(["a"], lambda text, task: 0.0, val_tasks=["b"], **settings)
