"""``lightning-rft debug``: what it shows of a sample, and what it leaves behind."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from transformers import AutoTokenizer

import lightning_rft as rft
from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group, GroupKey, Task, Turn
from lightning_rft.run.debug import debug
from lightning_rft.run.transcript import transcript
from lightning_rft.scores import Answer
from tests.processes import share_of_letters
from tests.test_evaluate import run_command

pytestmark = pytest.mark.usefixtures("one_thread")


async def twice(task: Task, policy: Any) -> Answer:
    """A conversation of two turns, and a turn that is apart."""
    messages = [{"role": "user", "content": task.prompt}]
    first = await policy(messages)
    first.reward = 0.25
    second = await policy([*messages, first.message, {"role": "user", "content": "And?"}])
    apart = await policy("Apart: ")
    return Answer(second, rewards={"right": 0.5, "short": 0.25}, metrics={"words": len(apart)})


async def fails(task: Task, policy: Any) -> str:
    raise KeyError("no such thing")


@pytest.fixture
def config(tmp_path: Path, tiny_model_path: Path) -> Path:
    given = {
        "model": {"model": str(tiny_model_path)},
        "data": {
            "tasks": [{"prompt": f"{index} + 1 =", "id": f"sum-{index}"} for index in range(6)],
            "reward": "tests.processes.share_of_letters",
            "workflow": "tests.test_debug.twice",
            "engine": "TransformersEngine",
            "explorers": 2,
            "tasks_per_step": 2,
            "samples_per_task": 4,
            "max_new_tokens": 4,
            "buffer": str(tmp_path / "kept.sqlite"),
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "callbacks": [{"class_path": "MultiExplorerAsynchronous"}],
            "default_root_dir": str(tmp_path),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "enable_progress_bar": False,
        },
    }
    file = tmp_path / "given.yaml"
    file.write_text(yaml.safe_dump(given))
    return file


def left() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("lightning-rft-*"))


def test_one_sample_of_one_task(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = left()
    run_command("debug", "--config", str(config), "--task", "sum-3")
    said = capfd.readouterr().out
    assert "Task 'sum-3', 1 sample\n" in said and "\x1b" not in said
    assert "Sample 0 · reward 1 (right 0.5, short 0.25) · drift 0, turn_rewards 0.25, words " in said
    about = r"\d+ tokens read, \d sampled · version 0 · (stop|length) · temperature 1"
    assert re.search(rf"Turn 0 · {about} · reward 0.25\n", said)
    assert re.search(rf"Turn 1 · goes on from turn 0 · {about}\n", said)
    assert re.search(r"<\|user\|>3 \+ 1 =<\|end\|><\|assistant\|>⟦[^⟧]+⟧\n  read    [\d ]+\n  sampled [\d ]+\n", said)
    assert re.search(r"Would be trained: \d+ tokens in 2 lines, of \d+ tokens in all \(\d+ if every turn had", said)
    assert re.search(r"Line of turns 0.0, 0.1 · \d+ tokens, \d+ trained\n<\|user\|>3 \+ 1 =.*⟦[^⟧]+⟧.*And\?.*⟦", said)
    assert "Line of turns 0.2 · " in said
    assert left() == before and {path.name for path in config.parent.iterdir()} == {"given.yaml"}


def test_a_failure_is_shown_at_once(config: Path) -> None:
    options = ["--data.workflow", "tests.test_debug.fails", "--samples", "2", "--task", "2"]
    with pytest.raises(KeyError, match="no such thing"):
        run_command("debug", "--config", str(config), *options)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("sum-9", 1), "--task sum-9: no task has this id or place among the 6 tasks"),
        (("6", 1), "--task 6: no task"),
        (("0", 0), "--samples 0 must be at least 1"),
    ],
)
def test_what_there_is_not(tmp_path: Path, tiny_model_path: Path, asked: tuple[str, int], message: str) -> None:
    data = rft.RFTDataModule([f"{index} + 1 =" for index in range(6)], share_of_letters, rft.FakeEngine())
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "made")
    (tmp_path / "made").mkdir()
    with pytest.raises(ConfigurationError, match=message):
        debug(trainer, rft.RFTModule(str(tiny_model_path)), data, *asked)
    assert not (tmp_path / "made").exists()


def test_colours_say_what_is_trained(tiny_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)

    def turn(prompt: str, answer: str, **more: Any) -> Turn:
        ids = tokenizer(answer)["input_ids"]
        versions = [0, *[2] * len(ids)][: len(ids)]
        return Turn(tokenizer(prompt)["input_ids"], ids, [-1] * len(ids), versions, "stop", **more)

    turns = turn("Q\x1b:", "one"), turn("Q\x1b:one more", "two", parent=0), turn("Q", "s")
    turns = (*turns, Turn([39] * 9000, (), (), (), "stop"))
    group = Group(GroupKey(0, 0), "t\x1b", (Experience("t", 0, turns, 1.0), Experience("t", 1, turns[2:3], 0.0)))
    said = transcript(group, tokenizer, colour=True)
    assert "\x1b[1mTask 't\\x1b', 2 samples\x1b[0m" in said
    escaped = tokenizer.decode(turns[0].prompt_ids)
    assert f"\x1b[2m{escaped}\x1b[0m\x1b[1;32mone\x1b[0m\x1b[2m more\x1b[0m\x1b[1;32mtwo\x1b[0m" in said  # the line
    assert " · version 0, 2 · " in said and "[5000 characters]" in said and "… [8976] …" in said
    # "s" is predicted from the "Q" of the longer line, and is no part of it
    assert re.search(r"Would be trained: 8 tokens in 1 line, of \d+ tokens in all", said)
    assert "8 trained" in said and said.count("token 1 is also \x1b[1;32ms\x1b[0m, where a turn ends") == 2
    empty = Group(GroupKey(0, 0), "t", (Experience("t", 0, turns[3:], 0.0),))
    assert "nothing would be trained" in transcript(empty, tokenizer, colour=False)
