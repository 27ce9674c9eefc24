"""Prompts: what may be one, its tokens, and the context that all of them need."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.spec import fitting_length
from lightning_rft.model_folder import Pretrained
from lightning_rft.tasks.prompts import Prompt, encode_prompt, encode_prompts
from lightning_rft.tasks.sources import as_tasks

CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
RENDERED = "<|system|>Add.<|end|><|user|>1+1<|end|><|assistant|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_path)


def strict(tokenizer_path: Path, folder: Path, template: str) -> Path:
    """A copy of a model with another chat template."""
    shutil.copytree(tokenizer_path, folder)
    copied = AutoTokenizer.from_pretrained(folder)
    copied.chat_template = template
    copied.save_pretrained(folder)
    return folder


def test_plain_text_is_encoded_as_it_is(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, "1 + 1 =")
    assert isinstance(ids, tuple) and len(ids) == 7
    assert tokenizer.decode(ids) == "1 + 1 ="


def test_messages_go_through_the_chat_template(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, CHAT)
    assert isinstance(ids, tuple) and all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == RENDERED
    assert encode_prompt(tokenizer, tuple(CHAT)) == ids


@pytest.mark.parametrize(
    "chat",
    [
        [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]}],
        [{**CHAT[0], "name": None, "tool_calls": None}, CHAT[1]],
        [*CHAT, {"role": "assistant", "content": " "}],
    ],
    ids=["parts", "keys without a value", "an answer that has not begun"],
)
def test_messages_are_normalised(tokenizer: Any, chat: Prompt, request: pytest.FixtureRequest) -> None:
    expected = RENDERED if request.node.callspec.id != "an answer that has not begun" else None
    text = tokenizer.decode(encode_prompt(tokenizer, chat))
    assert text == expected if expected else text.endswith("<|assistant|> <|end|><|assistant|>")


def test_a_last_message_of_the_assistant_is_continued(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, [*CHAT, {"role": "assistant", "content": "The sum is"}])
    assert tokenizer.decode(ids) == RENDERED + "The sum is"


def test_text_that_is_rendered_gets_no_second_beginning(tokenizer: Any) -> None:
    class Begins:
        """Puts a token in front of every text, as Llama's tokenizer does."""

        bos_token = "<|unk|>"

        def __call__(self, texts: Sequence[str], add_special_tokens: bool = True) -> Any:
            return tokenizer([self.bos_token * add_special_tokens + text for text in texts])

    begins = Begins()
    ids = encode_prompt(begins, "1+1")
    assert ids[0] == tokenizer.unk_token_id and len(ids) == 4
    assert encode_prompts(begins, ["1+1", "<|unk|>1+1", "2"]) == [ids, ids, encode_prompt(begins, "2")]


def test_prompts_of_all_kinds_together_are_what_each_is_alone(tokenizer: Any) -> None:
    prompts: list[Prompt] = ["a", CHAT, "bb", [*CHAT, {"role": "assistant", "content": "x"}], CHAT[1:]]
    assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, prompt) for prompt in prompts]


# The context


def length(model: Path, tasks: Sequence[Any], **changes: Any) -> int:
    settings: dict[str, Any] = {"max_new_tokens": 8, "max_model_len": None, "single_turn": True}
    return fitting_length(Pretrained(str(model)), as_tasks(tasks) if tasks else [], **settings | changes)


def test_a_template_that_refuses_a_role_names_the_task(tiny_model_path: Path, tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
        "{{ message.content }}{% endfor %}"
    )
    model = strict(tiny_model_path, tmp_path / "model", template)
    tasks = ["text", {"prompt": CHAT[1:]}, {"prompt": CHAT, "id": "with system"}]
    with pytest.raises(ConfigurationError, match=r"task 'with system': .*template refuses .*No system"):
        length(model, tasks)


def test_every_prompt_is_measured_in_tokens(tiny_model_path: Path) -> None:
    # one token of this tokenizer for what is three characters of another
    tasks = ["<|user|>" * 20] * 600 + ["x" * 150]
    assert max(len(task) for task in tasks[:600]) > len(tasks[-1])
    assert length(tiny_model_path, tasks) == 150 + 8 + 128


def test_the_models_context_where_prompts_are_unknown_or_turns_may_fill_it(tiny_model_path: Path) -> None:
    assert length(tiny_model_path, []) == 512
    assert length(tiny_model_path, ["x"], single_turn=False) == 512
    assert length(tiny_model_path, ["x"] * 10_001) == 512
    assert length(tiny_model_path, ["x"] * 10_001, max_model_len=99) == 99


def test_a_prompt_that_does_not_fit_costs_its_task_alone(
    tiny_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert length(tiny_model_path, ["x" * 100, "x" * 600, "x" * 505]) == 100 + 8 + 128
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_rft")]
    assert said.startswith("2 of 3 prompts and max_new_tokens=8 do not fit a context of 512 tokens")
    assert "of task '1', has 600 tokens" in said
    with pytest.raises(ConfigurationError, match="longer than the context of 512 tokens"):
        length(tiny_model_path, ["x" * 600])


def test_what_is_done_to_prompts_is_said_once(tiny_model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun = {"prompt": [*CHAT, {"role": "assistant", "content": "x"}]}
    length(tiny_model_path, ["1", begun, begun])
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_rft")]
    assert said == "task '1' ends with a message of the assistant, which the answer continues"
