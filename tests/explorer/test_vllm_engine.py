"""vLLM computes with the weights it was sent, all of them, and with nothing that older ones left behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_rft.explorer.engines.requests import Request
from lightning_rft.explorer.engines.sleeping import DROPS, WEIGHTS
from lightning_rft.explorer.engines.vllm import VLLMEngine
from lightning_rft.model_folder import Pretrained
from lightning_rft.sampling import Sampling
from tests.explorer.in_process import InProcess
from tests.explorer.links import MemoryLink
from tests.hub import on_the_hub, use_cache, with_own_code

pytestmark = [pytest.mark.vllm]
torch = pytest.importorskip("torch")

SHORT = tuple(range(10, 22))
LONG = tuple(10 + i * 7 % 90 for i in range(300))
VERSION = 5


def load(engine: VLLMEngine, tensors: Mapping[str, Any], version: int) -> None:
    link = MemoryLink()
    manifest = link.push(tensors)
    engine.connect(link)
    engine.load(manifest, version)


def load_by(way: str, engine: VLLMEngine, tensors: Mapping[str, Any], version: int) -> None:
    from lightning_rft.sync.transports.ipc import IPCSender
    from lightning_rft.sync.transports.nccl import NCCLSender
    from lightning_rft.sync.transports.transport import Sender, Weights
    from tests.sync.cuda_on_cpu import CUDA
    from tests.sync.ipc_on_cpu import IPC

    where = torch.device("cuda:1"), 60.0, 1 << 14
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as threads, TemporaryDirectory() as folder:
        sender: Sender
        if way == "ipc":
            IPC.put_in_place(patch, "both", Path(folder), [0, 1])
            sender = IPCSender(*where)
        else:
            CUDA.put_in_place(patch)
            sender = NCCLSender(*where)
        links = Queue[Any]()
        explorers: Any = SimpleNamespace(address="127.0.0.1", connect=lambda _, link: links.put(link))
        joined = threads.submit(sender.join, explorers, {0: 1})
        engine.connect(links.get(timeout=60))
        joined.result()
        weights = Weights.of(list(tensors.items()), "float32")
        sent = threads.submit(sender.send, sender.begin(weights), weights.manifest)
        engine.load(weights.manifest, version)
        sent.result()
        sender.close()


def drain(engine: VLLMEngine) -> dict[str, Any]:
    done = {}
    while engine.has_work:
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


def started(model: str | Pretrained) -> VLLMEngine:
    engine = VLLMEngine(dtype="float32")
    engine.start(model, max_model_len=400, seed=0)
    return engine


def after_a_push(old: str, new: str) -> dict[str, Any]:
    """Everything observable of an engine that started with old weights and was sent new ones."""
    from safetensors.torch import load_file

    from lightning_rft.errors import ScheduleError, TransportError

    engine = started(old)
    tensors = load_file(f"{new}/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    seen: dict[str, Any] = {"before": engine.prompt_logprobs(LONG)}
    # a full prefix in the cache, and a request in mid-generation
    engine.add(Request("cached", LONG, Sampling(1, 0.0)))
    drain(engine)
    engine.add(Request("running", SHORT, Sampling(12, 0.0)))
    for _ in range(4):
        engine.step()
    load(engine, tensors, VERSION)
    seen["running"] = drain(engine)["running"]
    seen["short"], seen["long"] = engine.prompt_logprobs(SHORT), engine.prompt_logprobs(LONG)
    engine.add(Request("again", LONG, Sampling(4, 0.0)))
    seen["again"] = drain(engine)["again"]
    refused = {
        "lm_head": {name: t for name, t in tensors.items() if name != "lm_head.weight"},
        "embed_tokens": {name: t for name, t in tensors.items() if name != "model.embed_tokens.weight"},
        "qkv_proj": {name: t for name, t in tensors.items() if "layers.1.self_attn.k_proj" not in name},
        "norm": {name: t for name, t in tensors.items() if name != "model.norm.weight"},
        "nonsense": tensors | {"nonsense.weight": torch.zeros(3)},
    }
    for word, part in refused.items():
        with pytest.raises(TransportError) as error:
            load(engine, part, VERSION + 1)
        seen[word] = str(error.value)
    assert engine.version == VERSION
    load(engine, tensors, VERSION + 2)  # a whole push after a torn one is taken
    seen["recovered"] = engine.prompt_logprobs(LONG)
    before = load_file(f"{old}/model.safetensors")
    load(engine, before | {"lm_head.weight": before["model.embed_tokens.weight"]}, VERSION + 3)
    seen["back"] = engine.prompt_logprobs(LONG)
    for number, way in enumerate(("nccl", "ipc")):
        if number:
            load(engine, before | {"lm_head.weight": before["model.embed_tokens.weight"]}, VERSION + 3)
        load_by(way, engine, tensors, VERSION + 4)
        seen[f"by_{way}"] = engine.prompt_logprobs(LONG)
    engine.sleep(DROPS)
    with pytest.raises(ScheduleError, match="step while its weights and kv_cache"):
        engine.step()
    assert engine.wake(WEIGHTS) == ["weights"]
    seen["asleep"] = [engine._alive.is_sleeping()]
    load(engine, before | {"lm_head.weight": before["model.embed_tokens.weight"]}, VERSION + 5)
    assert engine.wake() == ["kv_cache"]
    seen["asleep"].append(engine._alive.is_sleeping())
    seen["woken"] = engine.prompt_logprobs(LONG)
    engine.stop()
    engine.stop()
    return seen


def fresh(new: Pretrained, cache: Path, running: Sequence[int]) -> dict[str, Any]:
    """The same of an engine that started with the new weights, a revision on the hub whose config is code."""
    with pytest.MonkeyPatch.context() as patch:
        use_cache(cache, patch)
        engine = started(new)
    seen: dict[str, Any] = {
        "short": engine.prompt_logprobs(SHORT),
        "long": engine.prompt_logprobs(LONG),
        "running": engine.prompt_logprobs([*SHORT, *running]),
    }
    engine.add(Request("again", LONG, Sampling(4, 0.0)))
    seen["again"] = drain(engine)["again"]
    engine.stop()
    return seen


def told_on_a_gpu(model: str, sleeps: bool) -> Any:
    """What vLLM would be told of sleep if there were a GPU."""
    from vllm.engine import arg_utils
    from vllm.platforms import current_platform

    engine = VLLMEngine(dtype="float32")
    engine.sleeps = sleeps
    told: dict[str, Any] = {}

    def arguments(**settings: Any) -> Any:
        told.update(settings)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arg_utils, "EngineArgs", arguments)
        patch.setattr(type(current_platform), "is_cpu", lambda self: False)
        with pytest.raises(InterruptedError):
            engine.start(model, max_model_len=400, seed=0)
    return told["enable_sleep_mode"]


def with_adapter(model: str, adapter: str) -> list[float]:
    """What vLLM itself computes with a folder of an adapter."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model,
        dtype="float32",
        max_model_len=400,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        kv_cache_memory_bytes=2**26,
    )
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (answer,) = engine.generate(
        {"prompt_token_ids": list(LONG)}, params, lora_request=LoRARequest("saved", 1, adapter), use_tqdm=False
    )
    return [entry[token].logprob for token, entry in zip(LONG[1:], answer.prompt_logprobs[1:], strict=True)]


@pytest.fixture(scope="module")
def observed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path, with_vllm: InProcess
) -> tuple[dict[str, Any], dict[str, Any]]:
    from lightning_rft.testing import tiny_model

    folder = tmp_path_factory.mktemp("push")
    new, cache = tiny_model(folder / "new", seed=7), folder / "hub"
    revisions = {"main": tiny_model_path, "v1": with_own_code(folder / "own", seed=7)}
    model = Pretrained(on_the_hub(cache, revisions), "v1", trust_remote_code=True)
    pushed = with_vllm(folder, after_a_push, str(tiny_model_path), str(new))
    return pushed, with_vllm(folder, fresh, model, cache, pushed["running"].token_ids)


def close(a: Sequence[float], b: Sequence[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4


def test_prompt_logprobs_equal_a_fresh_engines(observed: Any) -> None:
    pushed, fresh_engine = observed
    assert not close(pushed["before"], fresh_engine["long"]), (
        "the weights must differ visibly for this to mean anything"
    )
    assert close(pushed["short"], fresh_engine["short"])
    assert close(pushed["long"], fresh_engine["long"])


def test_a_cached_prefix_does_not_outlive_the_push(observed: Any) -> None:
    pushed, fresh_engine = observed
    assert pushed["again"].token_ids == fresh_engine["again"].token_ids
    assert close(pushed["again"].logprobs, fresh_engine["again"].logprobs)


def test_a_running_request_goes_on_with_the_new_weights(observed: Any) -> None:
    pushed, fresh_engine = observed
    running = pushed["running"]
    swap = running.versions.index(VERSION)
    assert 0 < swap < len(running.versions)
    assert running.versions == (-1,) * swap + (VERSION,) * (len(running.versions) - swap)
    truth = fresh_engine["running"][len(SHORT) - 1 :]
    assert close(running.logprobs[swap:], truth[swap:])
    assert not close(running.logprobs[:swap], truth[:swap])


@pytest.mark.parametrize("left_out", ["lm_head", "embed_tokens", "qkv_proj", "norm"])
def test_a_weight_that_was_left_out_is_an_error_that_names_it(observed: Any, left_out: str) -> None:
    assert left_out in observed[0][left_out]
    assert "kept old weights" in observed[0][left_out]


def test_an_unknown_name_is_an_error(observed: Any) -> None:
    assert "nonsense" in observed[0]["nonsense"]


@pytest.mark.parametrize("way", ["nccl", "ipc"])
def test_weights_that_come_within_gpus_are_computed_with(observed: Any, way: str) -> None:
    assert close(observed[0]["back"], observed[0]["before"])
    assert close(observed[0][f"by_{way}"], observed[1]["long"])


def test_an_engine_that_slept_computes_with_what_was_pushed_when_it_woke(observed: Any) -> None:
    assert observed[0]["asleep"] == [True, False]  # as vLLM sees it: requests wait until all of it is awake
    assert close(observed[0]["woken"], observed[0]["before"])


@pytest.mark.parametrize("sleeps", [True, False])
def test_vllm_is_told_that_it_will_sleep(
    sleeps: bool, tiny_model_path: Path, tmp_path: Path, with_vllm: InProcess
) -> None:
    assert with_vllm(tmp_path, told_on_a_gpu, str(tiny_model_path), sleeps) is sleeps


def test_a_whole_push_after_a_torn_one_is_taken(observed: Any) -> None:
    assert close(observed[0]["recovered"], observed[1]["long"])


def test_a_saved_adapter_is_one_of_vllms(tiny_model_path: Path, tmp_path: Path, with_vllm: InProcess) -> None:
    pytest.importorskip("peft")
    from lightning_rft.trainer.module import RFTModule

    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}  # so not zero
    module = RFTModule(tiny_model_path, peft_config=config)
    module.configure_model()
    module.save_pretrained(tmp_path / "adapter")
    plain = RFTModule(tiny_model_path)
    plain.configure_model()
    ids = torch.tensor([LONG])
    expected, base = (
        one._policy(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
        for one in (module, plain)
    )
    assert not close(expected, base)
    assert close(with_vllm(tmp_path, with_adapter, str(tiny_model_path), str(tmp_path / "adapter")), expected)
