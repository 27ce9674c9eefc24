"""How a user's workflow is called, and what it may return."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import replace
from typing import Any

from lightning_rft.errors import ConfigurationError, ContextFull, DeadlineError
from lightning_rft.experience import Task
from lightning_rft.explorer.worker.openai_requests import FULL
from lightning_rft.explorer.worker.users_code import in_time
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.scores import Answer, finite
from lightning_rft.settings import Timeouts
from lightning_rft.tasks.prompts import text_problem

__all__ = ["ask"]


async def ask(workflow: Any, task: Task, policy: Policy, timeouts: Timeouts) -> Answer:
    """What a workflow answers a task with; the policy's last answer if the context, or the sample's time, was used up.

    Raises :class:`DeadlineError` if it hangs, :class:`ConfigurationError` if it returned no answer or has not
    called the policy, or what it raised.
    """
    task_id = task.id  # a workflow may change its task
    late = (
        f"the workflow of task {task_id!r} made no call and did not return for Timeouts(workflow_s="
        f"{timeouts.workflow_s:g}): make it faster or raise the setting"
    )
    if timeouts.sample_s is not None:
        policy.at_close(asyncio.get_running_loop().call_later(timeouts.sample_s, policy.end_answers).cancel)
    try:
        returned = await in_time(
            _call(workflow, task, policy), timeouts.workflow_s, late, progressed=policy.progressed, over=policy.over
        )
    except Exception as error:
        if policy.over.is_set() and not policy.replies:
            raise DeadlineError(
                f"the workflow of task {task_id!r} made its first call after Timeouts(sample_s={timeouts.sample_s:g}): "
                "make it faster or raise the setting"
            ) from error
        if not policy.replies or not (_is_full(error) or policy.over.is_set()):
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
