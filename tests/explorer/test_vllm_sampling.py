"""vLLM samples as it is asked to, and tells what each token was chosen from: grammars, bans and stops included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.engines.vllm import VLLMEngine
from lightning_rft.sampling import Sampling
from tests.exact_sampling import PROMPTS, REMOVALS, TRUNCATIONS, drain, gap, masses, naive, paths, requests, turns
from tests.explorer.in_process import InProcess

pytestmark = [pytest.mark.vllm]

SAME, NAIVE = 1e-3, 0.1
GRAMMARS = {
    "choice": Sampling(12, 1.3, top_k=64, structured={"choice": ["yes", "no", "yesterday"]}),
    "regex": Sampling(12, 1.3, top_k=64, structured={"regex": "[0-9]{2}=[a-c]"}),
    "json": Sampling(40, 1.3, top_k=64, structured={"json": {"type": "object", "properties": {"a": {"enum": [1, 2]}}}}),
}
WAYS = TRUNCATIONS | REMOVALS | GRAMMARS
REFUSED = {
    "regex": Sampling(4, 1.0, structured={"regex": "(["}),
    "logit_bias": Sampling(4, 1.0, logit_bias={9999: 1.0}),
    "temperature": Sampling(4, 3.0),
}


def sampled(folder: str, stop: str) -> tuple[dict[str, Completion], dict[str, str]]:
    engine = VLLMEngine(dtype="float32")
    engine.start(folder, max_model_len=200, seed=0)
    messages = {}
    for name, sampling in REFUSED.items():
        with pytest.raises(ConfigurationError) as error:
            engine.add(Request(name, PROMPTS[0], sampling))
        messages[name] = str(error.value)
    greedy = Sampling(24, 0.0)
    others = [
        Request("greedy", PROMPTS[0], greedy),
        Request("stop", PROMPTS[0], Sampling(stop=["never", stop]).filled(greedy)),
        Request("later", PROMPTS[0], Sampling(stop=stop, min_new_tokens=15).filled(greedy)),
        Request("all", PROMPTS[0], Sampling(8, 1.0, 5)),
    ]
    done = drain(engine, [*requests(WAYS), *others])
    whole = done["greedy"]
    kept = Completion("kept", whole.token_ids[:4], whole.logprobs[:4], (7,) * 4, "")  # of an engine that is gone
    engine.add(Request("cut", PROMPTS[0], greedy))
    for _ in range(3):
        engine.step()
    engine.cut(["cut", "unknown"])
    done |= drain(engine, [Request("kept", PROMPTS[0], greedy, kept)])
    engine.stop()
    return done, messages


@pytest.fixture(scope="module")
def oracle(tiny_model_path: Path) -> Any:
    from lightning_rft.explorer.engines.transformers import TransformersEngine

    engine = TransformersEngine(dtype="float32", device="cpu")
    engine.start(str(tiny_model_path), max_model_len=200, seed=0)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture(scope="module")
def stop(oracle: Any, tokenizer: Any) -> str:
    """Two letters from within the greedy answer."""
    free = drain(oracle, [Request("greedy", PROMPTS[0], Sampling(24, 0.0))])["greedy"]
    text: str = tokenizer.decode(free.token_ids[5:7])
    return text


@pytest.fixture(scope="module")
def observed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path, stop: str, with_vllm: InProcess
) -> tuple[dict[str, Completion], dict[str, str]]:
    return with_vllm(tmp_path_factory.mktemp("sampling"), sampled, str(tiny_model_path), stop)


@pytest.mark.parametrize("way", WAYS)
def test_ratios_are_one(way: str, observed: Any, tiny_model_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done, _ = observed
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()
    answers = turns(requests({way: WAYS[way]}), done)
    for name, path in paths(model).items():
        assert gap(model, path, answers) < SAME, name
        assert gap(model, path, naive(answers)) > NAIVE, name
    for request in requests({way: WAYS[way]}):
        assert float((masses(done[request.id]) - 1).abs().max()) < 1e-5, "nothing that could be sampled is missing"


@pytest.mark.parametrize("way", TRUNCATIONS | REMOVALS)
def test_the_oracle_leaves_the_same_tokens(way: str, observed: Any, tiny_model_path: Path, oracle: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_rft.explorer.engines.processing import choices, drawn_from
    from lightning_rft.explorer.engines.requests import Running

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_path).eval()
    for request in requests({way: WAYS[way]}):
        one = observed[0][request.id]
        ids = torch.tensor([[*request.prompt_ids, *one.token_ids]])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
            rows = [Running(request, 99, token_ids=list(one.token_ids[:count])) for count in range(len(logits))]
            truth = [set(choices(row)) for row in drawn_from(logits, rows, oracle._eos)]
        counts = one.support.counts.tolist()
        found = [set(part.tolist()) for part in torch.tensor(one.support.token_ids.tolist()).split(counts)]
        different = sum(ours != theirs for ours, theirs in zip(found, truth, strict=True))
        assert different <= 1  # where a token is just at the border


def test_an_answer_goes_on_from_what_was_kept_of_it(observed: Any) -> None:
    done, _ = observed
    assert done["kept"].token_ids == done["greedy"].token_ids
    assert done["kept"].versions[:5] == (7, 7, 7, 7, -1)
    assert done["kept"].logprobs == pytest.approx(done["greedy"].logprobs, abs=SAME)
    assert done["kept"].finish_reason == done["greedy"].finish_reason


def test_an_answer_that_is_cut_ends_with_its_next_token(observed: Any) -> None:
    cut, whole = observed[0]["cut"], observed[0]["greedy"]
    assert cut.token_ids == whole.token_ids[:4] and cut.finish_reason == "length"


def test_what_a_grammar_forces_is_known(observed: Any, tokenizer: Any) -> None:
    done, _ = observed
    said = set()
    for request in requests({"choice": WAYS["choice"]}):
        one = done[request.id]
        text = tokenizer.decode(one.token_ids, skip_special_tokens=True)
        said.add(text)
        assert one.finish_reason == "stop" and one.token_ids[-1] == tokenizer.eos_token_id
        if text == "no":
            assert one.support.counts.tolist() == [2, 1, 1]
        else:  # after "yes" there is a choice
            assert one.support.counts.tolist()[:4] == [2, 1, 1, 2]
    assert said <= {"yes", "no", "yesterday"} and len(said) > 1
    for request in requests({"regex": WAYS["regex"]}):
        one = done[request.id]
        assert one.support.counts.tolist() == [10, 10, 1, 3, 1]
        assert [logprob for logprob, count in zip(one.logprobs, one.support.counts, strict=True) if count == 1] == [
            0,
            0,
        ]


def test_stops_end_an_answer_where_the_oracle_ends_it(observed: Any, oracle: Any, stop: str) -> None:
    greedy = Sampling(24, 0.0)
    theirs = drain(
        oracle,
        [
            Request("greedy", PROMPTS[0], greedy),
            Request("stop", PROMPTS[0], Sampling(stop=["never", stop]).filled(greedy)),
            Request("later", PROMPTS[0], Sampling(stop=stop, min_new_tokens=15).filled(greedy)),
        ],
    )
    done, _ = observed
    for name, one in theirs.items():
        assert (done[name].token_ids, done[name].finish_reason) == (one.token_ids, one.finish_reason), name
    assert done["stop"].finish_reason == "stop" and len(done["stop"].token_ids) <= 7
    assert len(done["later"].token_ids) > 15


def test_what_it_refuses_is_named_and_harms_nobody(observed: Any) -> None:
    done, messages = observed
    for name, message in messages.items():
        assert message.startswith("vLLM refuses Sampling(max_new_tokens=4, ") and name in message
    assert done["all"].support is None and len(done["all"].logprobs) == 8
