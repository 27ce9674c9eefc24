"""Every code block of README.md and docs/: Python is run, commands and configs are parsed."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import lightning_rft as rft
from tests.documents import PAGES, Block, blocks, calls, check_shell, check_yaml, unknown_keywords
from tests.processes import LightEngine

LANGUAGES = {"python", "bash", "yaml", "text"}

pytestmark = pytest.mark.usefixtures("one_thread", "no_seed_left_behind")


def stand_in(engine: Callable[..., Any]) -> Callable[..., LightEngine]:
    """Makes an engine that computes nothing, of arguments that the real one must take too."""

    def make(*arguments: Any, **settings: Any) -> LightEngine:
        engine(*arguments, **settings)
        return LightEngine(mean_tokens=4)

    return make


@pytest.fixture
def in_miniature(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trainers that take two quiet steps on the CPU, and engines that compute nothing; files go to a folder."""

    class Trainer(L.Trainer):
        def __init__(self, **settings: Any) -> None:
            if "max_steps" in settings:
                settings["max_steps"] = min(2, settings["max_steps"])
            quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
            quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
            super().__init__(**settings | quiet)

    monkeypatch.setattr(L, "Trainer", Trainer)
    for name in ("VLLMEngine", "TransformersEngine"):
        monkeypatch.setattr(rft, name, stand_in(getattr(rft, name)))
    monkeypatch.chdir(tmp_path)


def run(block: Block, names: dict[str, Any], model: Path) -> None:
    """Executes a block; its tracebacks show lines of the page."""
    text = re.sub(r'"(path-or-hub-name|owner/name|HuggingFaceTB/[\w.-]+|Qwen/[\w.-]+)"', repr(str(model)), block.text)
    source = "\n" * block.line + text
    linecache.cache[str(block)] = (len(source), None, source.splitlines(keepends=True), str(block))
    exec(compile(source, str(block), "exec"), names)


@pytest.mark.usefixtures("in_miniature")
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.page == page for b in blocks("python"))], ids=str)
def test_python(page: Path, tiny_model_path: Path) -> None:
    """Blocks of a page share their names, and know those of the README's program."""
    first, *_ = blocks("python")
    names: dict[str, Any] = {"__name__": "__main__", "model": str(tiny_model_path)}
    run(first, names, tiny_model_path)
    assert names["trainer"].global_step == 2
    for block in blocks("python"):
        if block.page == page and block != first:
            run(block, names, tiny_model_path)


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAGES[0].parent)
    check_shell(block.text)


@pytest.mark.parametrize(
    "line",
    [
        "make bread",
        "make train CONFIG=examples/nowhere.yaml",
        "make test SPEED=9",
        "pip install -e '.[warp]'",
        "python -m benchmarks.nothing",
        "python examples/nothing.py",
        "lightning-rft fit --config examples/nowhere.yaml",
        "lightning-rft fit --config examples/synchronous.yaml --data.task_per_step 2",
        "lightning-rft fit --config examples/synchronous.yaml --print_config | lightning-rft fit --config - --nope 1",
        "lightning-rft dance",
        "lightning-rft evaluate lightning_logs/version_0 --data.val_answers 8",
        "lightning-rft report lightning_logs/version_0 --pages 3",
        "lightning-rft join node0:29600 --secret FILE --nope",
        "curl example.org",
    ],
)
def test_what_a_command_gets_wrong_is_found(
    line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PAGES[0].parent)
    with pytest.raises(AssertionError):
        check_shell(line)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_configs(block: Block, tmp_path: Path) -> None:
    check_yaml(block.text, tmp_path)


def test_what_a_config_gets_wrong_is_found(tmp_path: Path) -> None:
    check_yaml("data: {tasks_per_step: 2}\ntrainer: {callbacks: [{class_path: Synchronous}]}", tmp_path)
    with pytest.raises(AssertionError):
        check_yaml("data: {task_per_step: 2}", tmp_path)


def test_every_block_says_what_it_is() -> None:
    assert len(blocks()) > 5
    for block in blocks():
        assert block.language in LANGUAGES, f"{block} begins with ```{block.language}, not one of {LANGUAGES}"


def test_calls_within_text_have_the_arguments_that_there_are() -> None:
    found = list(calls())
    assert len(found) > 50
    for page, code, name, keywords in found:
        assert not unknown_keywords(name, keywords), f"{page}: `{code}`"
    assert unknown_keywords("rft.Synchronous", ["interval"]) == {"interval"}
