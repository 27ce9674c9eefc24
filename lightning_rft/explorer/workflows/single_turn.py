"""The workflow of one prompt and one answer."""

from __future__ import annotations

from lightning_rft.experience import Task
from lightning_rft.explorer.workflows.policy import Policy

__all__ = ["SingleTurn"]


class SingleTurn:
    """One prompt, one answer."""

    async def __call__(self, task: Task, policy: Policy) -> str:
        """Answers a task with one call of the policy."""
        return await policy(task.prompt)
