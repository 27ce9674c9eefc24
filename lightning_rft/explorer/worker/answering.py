"""How a user's workflow is called, and what it may return."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from lightning_rft.errors import ConfigurationError, ContextFull
from lightning_rft.experience import Task
from lightning_rft.explorer.worker.openai_requests import FULL
from lightning_rft.explorer.worker.users_code import in_time
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.scores import Answer, finite
from lightning_rft.tasks.prompts import text_problem

__all__ = ["ask"]


async def ask(workflow: Any, task: Task, policy: Policy, limit_s: float) -> Answer:
    """What a workflow answers a task with; the policy's last answer if it then came to the end of the context.

    Raises :class:`DeadlineError` if it took too long, :class:`ConfigurationError` if it returned no answer or has not
    called the policy, or what it raised.
    """
    task_id = task.id  # a workflow may change its task
    late = f"took longer than Timeouts(sample_s={limit_s:g}): make the workflow faster or raise the setting"
    try:
        returned = await in_time(_call(workflow, task, policy), limit_s, f"a sample of task {task_id!r} {late}")
    except Exception as error:
        if not (_is_full(error) and policy.replies):
            raise
        returned = policy.replies[-1]
    finally:
        policy.close()
    answer = _answer(returned, task_id)
    if not policy.replies:
        raise ConfigurationError(f"the workflow answered task {task_id!r} without calling the policy: nothing to train")
    for reply in policy.replies:
        if reply.reward is not None:
            what = f"the workflow set the reward of a turn of task {task_id!r} to"
            reply.reward = finite(reply.reward, what, ": set a finite number")
    return answer


def _is_full(error: BaseException) -> bool:
    """Whether an error says that the context is full: ours, a client's of the endpoint, or either in a task group's."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_full, error.exceptions))
    if isinstance(error, ContextFull) or getattr(error, "code", None) == FULL:
        return True
    return error.__cause__ is not None and _is_full(error.__cause__)


async def _call(workflow: Any, task: Task, policy: Policy) -> Any:
    answer = workflow(task, policy)
    if not inspect.isawaitable(answer):
        raise ConfigurationError("the workflow is no coroutine: define it as `async def workflow(task, policy)`")
    return await answer


def _answer(returned: Any, task_id: str) -> Answer:
    """What a workflow returned, with a text that is exactly a ``str``."""
    answer = Answer(returned) if isinstance(returned, str) else returned
    problem = text_problem(answer.text, "a text that") if isinstance(answer, Answer) else f"a {type(answer).__name__}"
    if problem:
        raise ConfigurationError(
            f"the workflow returned {problem} for task {task_id!r}: return the text that the reward shall score, or a "
            "lightning_rft.Answer"
        )
    return replace(answer, text=str.encode(answer.text).decode())
