"""An agent of pydantic-ai as a workflow, whose HTTP client writes down all of its calls. Imported by explorers."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import lightning_rft as rft

NUMBERS = (1, 2, 3)
TURNS = 3
# What the tiny model's chat template lacks; schemas would fill its context.
TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
IDS = {"return_token_ids": True}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {name: {"enum": NUMBERS} for name in ("a", "b")},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class AddingAgent:
    """Adds with a tool until it gives a total, or for three turns; then the tool is asked for by name, without it.

    A file of each sample in ``folder`` holds its task, the calls that the client made with what came back, and the
    numbers that the tool was given.
    """

    folder: Path

    async def __call__(self, task: rft.Task, policy: rft.Policy) -> str:
        import openai
        from pydantic import create_model
        from pydantic_ai import Agent, UsageLimitExceeded, UsageLimits
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        if not policy.tokenizer.chat_template.startswith(TOOLS):
            policy.tokenizer.chat_template = TOOLS + policy.tokenizer.chat_template
        calls: list[Any] = []
        sums: list[tuple[int, int]] = []

        async def note(response: Any) -> None:
            await response.aread()
            calls.append((json.loads(response.request.content), response.json()))

        def add(a: Literal[1, 2, 3], b: Literal[1, 2, 3]) -> int:
            """Adds two numbers."""
            sums.append((a, b))
            return a + b

        http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]}, trust_env=False, verify=False)
        async with policy.endpoint().openai(http_client=http) as client:
            model = OpenAIChatModel("policy", provider=OpenAIProvider(openai_client=client))
            agent = Agent(
                model,
                tools=[add],
                output_type=create_model("Total", total=(Literal[2, 3, 4, 5, 6], ...)),
                model_settings={"parallel_tool_calls": False, "extra_body": IDS},
            )
            try:
                run = await agent.run(str(task.prompt), usage_limits=UsageLimits(request_limit=TURNS))
                total = str(run.output.total)
            except UsageLimitExceeded:
                total = "none"
            await client.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": total}],
                tools=[ADD],
                tool_choice={"type": "function", "function": {"name": "add"}},
                extra_body=IDS,
            )
        heard = {"task": task.id, "calls": calls, "sums": sums}
        (self.folder / f"{uuid.uuid4().hex}.json").write_text(json.dumps(heard))
        return total
