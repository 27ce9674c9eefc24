"""Workflows that explorers import, so without torch: random trees of calls, and a workflow that a file names."""

from __future__ import annotations

import asyncio
import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rft.explorer.workflows.single_turn import SingleTurn
from lightning_rft.pickling import dumps

if TYPE_CHECKING:
    import lightning_rft as rft


async def wander(task: rft.Task, policy: rft.Policy) -> str:
    """Goes on, forks, calls twice at the same time, compacts and begins anew, as the task's id decides."""
    draw = random.Random(task.id)
    conversations = [[{"role": "user", "content": str(task.prompt)}]]

    async def call(messages: Sequence[dict[str, Any]], length: int) -> rft.Reply:
        reply = await policy(messages, max_new_tokens=length)
        conversations.append([*messages, reply.message])
        return reply

    reply = await call(conversations[0], 12)
    for step in range(draw.randint(1, 3)):
        asked = {"role": "user", "content": f"{step}?"}
        messages = draw.choice(conversations)
        match draw.choice(["turn", "together", "compact", "text"]):
            case "turn":
                reply = await call([*conversations[-1], asked], 10)
            case "together":
                reply, _ = await asyncio.gather(call([*messages, asked], 9), call([*messages, asked, asked], 9))
            case "compact":
                reply = await call([{"role": "system", "content": f"After {len(messages)}"}, asked], 8)
            case "text":
                reply = await policy(f"{task.prompt}{step}", max_new_tokens=8)
    return reply


@dataclass(frozen=True)
class Chosen:
    """The workflow that a folder names, and else one turn: runs that differ in it share their explorers."""

    folder: Path

    async def __call__(self, task: rft.Task, policy: rft.Policy) -> Any:
        chosen = self.folder / "workflow"
        workflow = pickle.loads(chosen.read_bytes()) if chosen.exists() else SingleTurn()
        return await workflow(task, policy)

    @contextmanager
    def as_(self, workflow: Any) -> Iterator[None]:
        """Names a workflow, between runs."""
        chosen = self.folder / "workflow"
        chosen.write_bytes(dumps(workflow))
        try:
            yield
        finally:
            chosen.unlink()
