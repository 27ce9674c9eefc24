"""The calls of one API key: a client that tries again by itself gets the answer to its first try.

What tells a retry from a new call is a count in a header, and what it repeats is the request, byte for byte. A call
ends with its sample, or when all its clients have hung up: no turn is kept of it then, and a retry that comes later
samples anew. An answer that was sampled is kept for retries, until the same request is made anew: its client must
have read the answer then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_rft.explorer.worker.openai_requests import Refusal
from lightning_rft.explorer.worker.parsers import Parser
from lightning_rft.explorer.workflows.policy import Policy

__all__ = ["Response", "Session", "ended"]


class Response(NamedTuple):
    """The body of a response."""

    body: bytes
    content_type: str


@dataclass(eq=False)
class _Call:
    work: asyncio.Task[Response]
    retry: int = 0  # of the client's tries, the latest
    waiting: int = 0  # requests that wait for it

    @property
    def usable(self) -> bool:
        if not self.work.done():
            return not self.work.cancelling()
        return not self.work.cancelled() and self.work.exception() is None


class Session:
    """What one API key stands for."""

    def __init__(self, policy: Policy, parser: Parser | None) -> None:
        self.policy = policy
        self.parser = parser
        self._calls: dict[bytes, list[_Call]] = {}  # by request
        self._closed = False

    async def ask(self, request: bytes, retry: int, work: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
        """The answer to a request, by ``work`` or by what an earlier try of the client began."""
        if self._closed:
            raise ended()
        call = self._repeated(request, retry) or self._begun(request, work)
        call.retry = max(call.retry, retry)
        call.waiting += 1
        try:
            await asyncio.wait([call.work])
        finally:
            call.waiting -= 1
            if not call.waiting:  # the last client has hung up, unless there is an answer
                call.work.cancel()
        if call.work.cancelled():
            raise ended()
        return call.work.result()

    def close(self) -> None:
        """Ends the calls that run, and refuses others."""
        self._closed = True
        for calls in self._calls.values():
            for call in calls:
                call.work.cancel()

    def _repeated(self, request: bytes, retry: int) -> _Call | None:
        calls = [call for call in self._calls.get(request, ()) if call.usable and call.retry < retry]
        if not calls:
            return None
        self.policy.counts["endpoint_retries"] += 1
        # Of calls alike, the one whose try is the one before; rather one whose client is gone.
        return min(calls, key=lambda call: (call.retry != retry - 1, call.waiting))

    def _begun(self, request: bytes, work: Callable[[], Coroutine[Any, Any, Response]]) -> _Call:
        call = _Call(asyncio.ensure_future(work()))
        running = [other for other in self._calls.get(request, ()) if not other.work.done()]
        self._calls[request] = [*running, call]
        return call


def ended() -> Refusal:
    """The answer to a call whose sample has ended."""
    return Refusal("the sample of this API key has ended", code="invalid_api_key", status=401)
