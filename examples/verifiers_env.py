"""Trains on an environment of `verifiers`, which runs as it is and calls vLLM's token-in-token-out route.

    pip install 'verifiers>=0.4' && python examples/verifiers_env.py

``verifiers`` renders the conversation to token ids by itself, the policy's endpoint answers with the ids that it
sampled, and exactly those are trained. It wants an older ``openai``, so give it an environment of its own.
"""

import os
import uuid

import openai
import verifiers.v1 as vf
from renderers import DefaultRendererConfig

import lightning_rft as rft

__all__ = ["InProcess", "Sums"]  # verifiers finds taskset and harness here by the module's name

MODEL = os.environ.get("MODEL", "runs/models/SmolLM2-135M-Instruct")
STEPS = int(os.environ.get("STEPS", "20"))


class SumData(vf.TaskData):
    """A question and its answer."""

    answer: str


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    """A sum."""

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        """1 where the last word of the last reply is the answer."""
        return float(trace.last_reply.split()[-1:] == [self.data.answer])


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    """Sums of two numbers up to 20."""

    def load(self):
        """Yields all of them."""
        for a in range(21):
            for b in range(21):
                asked = f"What is {a}+{b}? Answer with a number."
                yield SumTask(SumData(prompt=asked, answer=str(a + b)), self.config.task)


class InProcess(vf.Harness[vf.HarnessConfig]):
    """An agent that asks once, in this process: without a container."""

    APPENDS_SYSTEM_PROMPT, EXECUTES_CODE, NEEDS_CONTAINER = True, False, False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, tool_interception_url=None):
        """Runs the agent against the endpoint that verifiers puts before the policy's."""
        async with openai.AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            messages = [{"role": "user", "content": data.prompt}]
            await client.chat.completions.create(model=ctx.model, messages=messages)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


def environment() -> vf.Env:
    """The environment, loaded as verifiers' own commands load it."""
    name = os.path.splitext(os.path.basename(__file__))[0]
    agent = {"harness": {"id": name}, "runtime": {"type": "subprocess"}}
    return vf.load_environment(vf.resolve_env_config({"taskset": {"id": name}, "agent": agent}))


async def roll_out(task: rft.Task, policy: rft.Policy) -> vf.Trace:
    """Runs one episode of the task's number in the taskset."""
    endpoint = policy.endpoint()
    key = f"RFT_{uuid.uuid4().hex}"  # verifiers reads keys from the environment alone
    os.environ[key] = endpoint.api_key
    env = environment()
    client = vf.TrainClientConfig(
        base_url=endpoint.base_url.removesuffix("/v1"),
        api_key_var=key,
        renderer=DefaultRendererConfig(),
        renderer_model_name=MODEL,
    )
    sampling = vf.SamplingConfig(temperature=1.0, max_tokens=12)
    try:
        async with env.serving():
            slot = env.slots(list(env.taskset)[task.metadata["number"]], 1)[0]
            episode = await env.run_slot(slot, vf.ModelContext(model="policy", client=client, sampling=sampling))
    finally:
        del os.environ[key]
    if not episode.ok:
        raise RuntimeError("; ".join(error.message for error in episode.errors))
    return episode.traces[0]


async def workflow(task: rft.Task, policy: rft.Policy) -> rft.Answer:
    """What verifiers makes of an episode: its last reply, and its reward."""
    trace = await roll_out(task, policy)
    return rft.Answer(trace.last_reply, reward=trace.reward)


def main() -> None:
    """Trains."""
    import lightning as L
    import torch

    tasks = [rft.Task(task.data.prompt, metadata={"number": at}) for at, task in enumerate(environment().taskset)]
    module = rft.RFTModule(MODEL, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5))
    data = rft.RFTDataModule(
        tasks, engine=rft.VLLMEngine(dtype="float32"), workflow=workflow, tasks_per_step=4, max_new_tokens=12
    )
    L.Trainer(max_steps=STEPS, callbacks=[rft.Synchronous()], gradient_clip_val=1.0).fit(module, data)


if __name__ == "__main__":
    main()
