"""One environment while a sample lasts: its thread, its deadlines and its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lightning_rft.errors import DeadlineError
from lightning_rft.experience import Task
from lightning_rft.explorer.worker.users_code import in_time
from lightning_rft.explorer.workflows.own_thread import OwnThread
from lightning_rft.explorer.workflows.shapes import Step, describe, is_game, parameters_of, step_of
from lightning_rft.explorer.workflows.tool_calls import Call, as_text, error_text

__all__ = ["Episode"]

_log = logging.getLogger(__name__)


class Episode:
    """Calls an environment's methods, one at a time, each for at most ``limit_s``; :meth:`end` it on every path."""

    def __init__(self, limit_s: float) -> None:
        self.environment: Any = None
        self._limit_s = limit_s
        self._thread = OwnThread()
        self._shown = ""  # of a game, which shows all again each time
        self._closed = False

    async def begin(self, factory: Callable[..., Any], task: Task) -> Any:
        """Makes the environment."""
        given = {"task": task} if "task" in parameters_of(factory) else {}

        def make() -> Any:
            made = factory(**given)
            if self._closed and hasattr(made, "close"):  # it took so long that nobody waits any more
                made.close()
            return made

        self.environment = await self.call("factory", make)
        return self.environment

    async def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a method returns or raises; :class:`DeadlineError` if it takes too long."""
        late = f"the environment's {name}() took longer than Environment(timeout_s={self._limit_s:g})"
        try:
            return await in_time(self._thread.call(function, *args, **kwargs), self._limit_s, late)
        finally:
            if self._thread.calls:  # one hangs: what is called next shall not wait for it
                self._thread.end()
                self._thread = OwnThread()

    async def step(self, action: Any) -> Step:
        """Acts."""
        returned = await self.call("step", self.environment.step, action)
        if not is_game(self.environment):
            return step_of(returned)
        done = bool(returned[0])
        return Step(None if done else await self.shown(), 0.0, done)

    async def shown(self) -> str:
        """What a game shows, without what it has shown before."""
        _, seen = await self.call("get_observation", self.environment.get_observation)
        text = describe(seen)
        new = text.removeprefix(self._shown)
        self._shown = text
        return new.strip()

    async def outcome(self) -> float:
        """What a game has earned its only player, which it says when it is closed; 0 if it did not end."""
        self._closed = True
        rewards, _ = await self.call("close", self.environment.close)
        return float(rewards[0]) if rewards else 0.0

    async def use(self, functions: Mapping[str, Callable[..., Any]], call: Call) -> tuple[str, bool]:
        """What comes of a call of a tool, and whether it failed."""
        if call.problem:
            return f"Error: {call.problem}", True
        try:
            return as_text(await self.call(call.name, functions[call.name], **call.arguments)), False
        except DeadlineError:
            raise
        except Exception as error:  # such as that the game is over: the model's to read
            return error_text(error), True

    async def reward(self) -> dict[str, Any]:
        """What the sample has earned, as arguments of an answer; none if the environment does not say."""
        for name in ("get_reward", "reward"):
            value = getattr(self.environment, name, None)
            if callable(value):
                value = await self.call(name, value)
            if value is not None:
                return {"rewards" if isinstance(value, Mapping) else "reward": value}
        return {}

    async def end(self) -> None:
        """Closes the environment, if that was not done and can be."""
        closed, self._closed = self._closed, True
        try:
            if not closed and hasattr(self.environment, "close"):
                await self.call("close", self.environment.close)
        except Exception:  # the sample is whole, or has an error of its own
            _log.warning("%s.close() failed", type(self.environment).__name__, exc_info=True)
        finally:
            self._thread.end()
