"""The workflow of an environment: an object that has a state, and that the model acts on until it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from lightning_rft.errors import ConfigurationError, ContextFull
from lightning_rft.experience import Task
from lightning_rft.explorer.workflows.episode import Episode
from lightning_rft.explorer.workflows.policy import Policy, Reply
from lightning_rft.explorer.workflows.shapes import describe, first_observation, is_game, reset_arguments, tool_methods
from lightning_rft.explorer.workflows.tool_calls import Call, NamedParser, Parse, error_text
from lightning_rft.explorer.workflows.tools import Conversation, as_messages, check_limits, schemas_of
from lightning_rft.scores import Answer
from lightning_rft.tasks.prompts import plain_message

__all__ = ["Environment"]


class Environment:
    """A workflow in which the model acts on an environment of its own, one for each sample.

    The environment's shape decides how, so that those of other libraries fit as they are:

    - With ``reset`` and ``step``, as in Gymnasium, OpenEnv (in process or its client) and TextArena, an answer is an
      action and the model's next input what ``step`` observes. The reward of a step is that of the turn, and their sum
      that of the sample.
    - With ``reset`` and other public methods, as TRL's ``environment_factory`` takes it, those with a docstring are
      tools, as in :class:`Tools`. ``get_reward()``, ``reward()`` or an attribute ``reward`` is the sample's reward, a
      number or a mapping of parts; without any, the data module's reward is asked. An attribute ``done`` that is true
      ends the sample.

    ``reset`` is given what it has parameters for: ``seed``, ``prompt``, ``answer``, ``task``, and what is in the task's
    metadata; its ``**kwargs`` get all of it, as TRL's do. The seed is ``metadata["seed"]``, or follows from the task's
    id: all samples of a task begin in the same state. What ``reset`` observes is added to the last message of the
    task's prompt, if the user wrote that.

    Plain methods run on a thread of the environment's own, ``async`` ones on the event loop; ``close()`` is called at
    every end. An environment that never ends is left after ``max_turns`` answers, with what it has earned by then; one
    that hangs fails its sample.

    Args:
        factory: Makes the environment: its class, or a plain or ``async`` function. A parameter ``task`` is given the
            task.
        max_turns: Maximum answers of the model in a sample.
        timeout_s: Seconds that making the environment, and each of its methods, may take.
        action: Makes an action of an answer, such as ``int``. Where it raises, the model reads the error and answers
            again. Left out, the text without white space around it.
        observe: Makes a text of an observation. Left out, text as it is, other values as JSON.
        parser: How calls of tools are found, as for :class:`Tools`.

    Raises:
        ConfigurationError: A number is out of range, or a tool of the factory's class cannot be described.

    Example::

        tasks = [rft.Task("Cross the lake.", metadata={"seed": seed}) for seed in range(1000)]
        lake = rft.Environment(lambda: gymnasium.make("FrozenLake-v1", render_mode="ansi"), action=int)
        data = rft.RFTDataModule(tasks=tasks, workflow=lake)
    """

    def __init__(
        self,
        factory: type | Callable[..., Any],
        max_turns: int = 16,
        timeout_s: float = 60.0,
        action: type | Callable[[str], Any] | None = None,
        observe: Callable[[Any], str] | None = None,
        parser: str | Parse | None = None,
    ) -> None:
        check_limits("Environment", max_turns, timeout_s)
        if not callable(factory):
            raise ConfigurationError(f"Environment(factory={factory!r}) must be a class or function that makes one")
        if isinstance(factory, type) and not hasattr(factory, "step"):
            schemas_of({name: getattr(factory, name) for name in tool_methods(factory)})
        self.factory = factory
        self.max_turns = max_turns
        self.timeout_s = timeout_s
        self.action = action or str.strip
        self.observe = observe or describe
        self.parser = NamedParser(parser) if isinstance(parser, str) else parser
        self._resets: asyncio.Lock | None = None

    async def __call__(self, task: Task, policy: Policy) -> Answer:
        """Answers a task."""
        episode = Episode(self.timeout_s)
        try:
            environment = await episode.begin(self.factory, task)
            if not hasattr(environment, "reset"):
                raise ConfigurationError(f"{type(environment).__name__} is no environment: it has no reset()")
            run = self._step if hasattr(environment, "step") else self._use_tools
            return await run(task, policy, episode)
        finally:
            await episode.end()

    async def _reset(self, task: Task, episode: Episode, *, steps: bool) -> list[dict[str, Any]]:
        """Resets the environment, and returns the messages that the sample begins with."""
        environment = episode.environment
        arguments = reset_arguments(environment.reset, task, steps=steps)
        if is_game(environment):
            # TextArena seeds Python's own random numbers, which all of its games draw from.
            self._resets = self._resets or asyncio.Lock()
            async with self._resets:
                await episode.call("reset", environment.reset, **arguments)
            return _with_observation(as_messages(task.prompt), await episode.shown())
        returned = await episode.call("reset", environment.reset, **arguments)
        return _with_observation(as_messages(task.prompt), self.observe(first_observation(returned)))

    async def _step(self, task: Task, policy: Policy, episode: Episode) -> Answer:
        messages = await self._reset(task, episode, steps=True)
        replies: list[Reply] = []
        invalid, done = 0, False
        while not done and len(replies) < self.max_turns:
            try:
                reply = await policy(messages)
            except ContextFull:
                if not replies:
                    raise
                break
            replies.append(reply)
            reply.reward = 0.0
            try:
                action = self.action(reply)
            except Exception as error:  # the model's to read
                invalid += 1
                seen = error_text(error)
            else:
                observation, reply.reward, done = await episode.step(action)
                seen = self.observe(observation)
            messages = [*messages, reply.message, {"role": "user", "content": seen}]
        if is_game(episode.environment):
            replies[-1].reward = await episode.outcome()
        metrics = {"steps": len(replies) - invalid, "invalid_actions": invalid}
        return Answer(str(replies[-1]), reward=0.0, metrics=metrics)  # all of it is that of turns

    async def _use_tools(self, task: Task, policy: Policy, episode: Episode) -> Answer:
        environment = episode.environment
        names = tool_methods(environment)
        if not names:
            raise ConfigurationError(
                f"{type(environment).__name__} has neither step() nor a public method with a docstring, which would be "
                "a tool: give it one or the other"
            )
        functions = {name: getattr(environment, name) for name in names}

        async def answers(calls: Sequence[Call]) -> list[tuple[str, bool]]:
            return [await episode.use(functions, call) for call in calls]  # one after another: they share a state

        def ended() -> bool:
            return getattr(environment, "done", False) is True

        conversation = Conversation(policy, schemas_of(functions), self.parser)
        reply = await conversation.run(await self._reset(task, episode, steps=False), self.max_turns, answers, ended)
        return Answer(str(reply), metrics=conversation.metrics, **await episode.reward())


def _with_observation(messages: list[dict[str, Any]], observation: str) -> list[dict[str, Any]]:
    """Messages that end with what the environment shows first, in the user's last one if it is the last."""
    last = plain_message(messages[-1])
    if not observation:
        return messages
    if last["role"] != "user":
        return [*messages, {"role": "user", "content": observation}]
    return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{observation}"}]
