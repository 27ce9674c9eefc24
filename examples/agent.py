"""Teaches a small model to use a calculator, through an agent that knows only OpenAI's client.

    make model && python examples/agent.py

SEED, STEPS, MODEL and OUT are taken from the environment; OUT/version_0/metrics.csv has the learning curve.

The model cannot add numbers of three digits: without the calculator it stays at zero. It may write ``calc(1 + 2)``, as
in the conversation that each prompt begins with, is told the result, and is to answer with it. SmolLM2's chat template
knows no tools, so that this protocol is plain text.
"""

import os
import random
import re

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_rft as rft

MODEL = os.environ.get("MODEL", "runs/models/SmolLM2-135M-Instruct")  # a folder, or a hub name: owner/name
STEPS = int(os.environ.get("STEPS", "20"))
SEED = int(os.environ.get("SEED", "0"))
OUT = os.environ.get("OUT", "runs/agent")
SHOWN = [
    {"role": "system", "content": "Use the calculator: write calc(a + b)."},
    {"role": "user", "content": "What is 52 + 171?"},
    {"role": "assistant", "content": "calc(52 + 171)"},
    {"role": "user", "content": "calculator: 223"},
    {"role": "assistant", "content": "223"},
]


async def agent(client, question, calculator):
    """Asks until there is an answer: any agent that speaks to OpenAI could be in its place."""
    messages = [*SHOWN, {"role": "user", "content": question}]
    for _ in range(3):
        reply = await client.chat.completions.create(model="policy", messages=messages)
        text = reply.choices[0].message.content
        call = re.search(r"calc\((\d+) \+ (\d+)\)", text)
        if call is None:
            break
        result = calculator(*map(int, call.groups()))
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"calculator: {result}"}]
    return text


def broken(a, b):
    """The calculator, taken away."""
    return "I am out of order."


async def workflow(task, policy):
    calculator = int.__add__ if task.metadata["calculator"] else broken
    async with policy.endpoint().openai() as client:
        return await agent(client, task.prompt, calculator)


def reward(completion, task):
    """1 for nothing but the right number, else 0."""
    return float(re.findall(r"\d+", completion) == [str(task.answer)])


def sums(first, last, calculator=True):
    pairs = [divmod(number, 900) for number in random.Random(0).sample(range(900 * 900), last)[first:]]
    metadata = {"calculator": calculator}
    return [rft.Task(f"What is {a + 100} + {b + 100}?", answer=a + b + 200, metadata=metadata) for a, b in pairs]


L.seed_everything(SEED, verbose=False)
module = rft.RFTModule(MODEL, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-6))
data = rft.RFTDataModule(
    sums(64, 2_000),
    reward,
    rft.VLLMEngine(dtype="float32"),  # bfloat16 would round most of such small updates away
    workflow=workflow,
    tasks_per_step=4,
    max_new_tokens=16,
    val_sampling=rft.Sampling(temperature=1.0),  # as in training: the most likely answer is a call from the start
    val_tasks={"with": sums(0, 64), "without": sums(0, 64, calculator=False)},
)
quick = {"num_sanity_val_steps": 0, "enable_checkpointing": False, "log_every_n_steps": 1, "gradient_clip_val": 1.0}
trainer = L.Trainer(max_steps=STEPS, logger=CSVLogger(OUT, name=""), callbacks=[rft.Synchronous()], **quick)
with data:  # the same explorers for all three
    trainer.validate(module, data)
    trainer.fit(module, data)
    trainer.validate(module, data)
