"""The endpoint of an explorer: programs in OpenAI's dialect call the policies of its samples.

A server of our own over :class:`Policy`, for every engine, and not vLLM's, which would tokenise again what was sampled.
A session is an API key. Its calls are those of its policy: nothing here knows of engines, turns or rewards.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from lightning_rft.errors import ConfigurationError, ContextFull
from lightning_rft.explorer.worker import openai_requests, openai_responses
from lightning_rft.explorer.worker.openai_messages import answer_message
from lightning_rft.explorer.worker.openai_requests import FULL, Call, Refusal, plain_message
from lightning_rft.explorer.worker.parsers import Parser
from lightning_rft.explorer.worker.session import Response, Session, ended
from lightning_rft.explorer.workflows.endpoint import Endpoint
from lightning_rft.explorer.workflows.policy import Policy
from lightning_rft.explorer.workflows.reply import Reply

if TYPE_CHECKING:
    from lightning_rft.explorer.worker.http_server import HTTPServer

__all__ = ["Endpoints"]

_log = logging.getLogger(__name__)


_COUNTED = "endpoint_refused", "endpoint_retries", "endpoint_temperature", "endpoint_unparsed"


class _Dialect(NamedTuple):
    """How one path is read and answered."""

    read: Callable[[Mapping[str, Any]], Call]
    answer: Callable[[Call, Reply, Mapping[str, Any], Any], dict[str, Any]]


_DIALECTS = {
    "/v1/chat/completions": _Dialect(openai_requests.chat_call, openai_responses.chat_answer),
    "/v1/completions": _Dialect(openai_requests.completion_call, openai_responses.completion_answer),
    "/inference/v1/generate": _Dialect(openai_requests.generate_call, openai_responses.generate_answer),
}


class Endpoints:
    """The sessions of an explorer, and the server that all of them share; it starts with the first."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._numbers = count()
        self._secret = secrets.token_bytes()
        self._parsers: dict[tuple[str | None, str | None], Parser] = {}
        self._server: HTTPServer | None = None
        self._warned = False

    def open(self, policy: Policy, tool_parser: str | None = None, reasoning_parser: str | None = None) -> Endpoint:
        """An address of a policy, which ends with its sample."""
        named = tool_parser, reasoning_parser
        if any(named) and named not in self._parsers:
            self._parsers[named] = Parser(policy.tokenizer, *named)
        if self._server is None:
            self._server = self._started()
        key = self._key(str(next(self._numbers)))
        session = self._sessions[key] = Session(policy, self._parsers.get(named))
        policy.counts.update(dict.fromkeys(_COUNTED, 0))

        def end() -> None:
            self._sessions.pop(key, None)
            session.close()

        policy.at_close(end)
        return Endpoint(f"{self._server.url}/v1", key)

    def stop(self) -> None:
        """Ends all sessions and the server; safe to call twice."""
        for session in list(self._sessions.values()):
            session.close()
        if self._server is not None:
            self._server.stop()

    def _started(self) -> HTTPServer:
        try:
            from lightning_rft.explorer.worker.http_server import HTTPServer
        except ImportError as error:
            raise ConfigurationError(
                f"policy.endpoint() needs aiohttp: pip install 'lightning-rft[agents]' ({error})"
            ) from error
        return HTTPServer(_DIALECTS, self._session, self._response)

    def _key(self, number: str) -> str:
        """An API key that nobody else can make, by which one that has ended is known without a list of them."""
        return f"rft-{number}-{hmac.digest(self._secret, number.encode(), 'sha256').hex()}"

    def _session(self, key: str) -> Session:
        session = self._sessions.get(key)
        if session is not None:
            return session
        key = key.encode(errors="replace").decode()  # a header may hold any bytes
        number = key.removeprefix("rft-").partition("-")[0]
        if hmac.compare_digest(key.encode(), self._key(number).encode()):
            raise ended()
        raise Refusal("unknown API key: use that of policy.endpoint()", code="invalid_api_key", status=401)

    async def _response(self, session: Session, path: str, body: bytes, retry: int) -> Response:
        request = hashlib.blake2b(path.encode() + b"\0" + body).digest()
        return await session.ask(request, retry, lambda: self._answer(session, path, body))

    async def _answer(self, session: Session, path: str, body: bytes) -> Response:
        dialect, policy = _DIALECTS[path], session.policy
        call = dialect.read(_parsed(body))
        self._note_replaced(session, call)
        if call.logprobs and not policy.sampling.keeps_support:
            raise Refusal(
                "log-probs of tokens beside the sampled one are not kept: ask for none, or set top_k in the run's "
                "Sampling",
                "top_logprobs",
                "unsupported_parameter",
            )
        reply = await self._reply(policy, call)
        # no await from here on: an answer that was sampled is kept for retries
        message = self._message(session, call, reply)
        answer = dialect.answer(call, reply, message, policy.tokenizer)
        if call.stream:
            return Response(openai_responses.stream(answer, call.usage), "text/event-stream")
        return Response(msgspec.json.encode(answer), "application/json")

    async def _reply(self, policy: Policy, call: Call) -> Reply:
        sampling = {setting: value for setting, (_, value) in call.settings.items()}
        try:
            return await policy(call.prompt, tools=call.tools, **sampling)
        except ContextFull as error:
            raise Refusal(str(error), call.prompt_name, FULL) from error
        except ConfigurationError as error:
            named = (name for setting, (name, _) in call.settings.items() if str(error).startswith(f"{setting}="))
            raise Refusal(str(error), next(named, call.prompt_name)) from error

    def _message(self, session: Session, call: Call, reply: Reply) -> dict[str, Any]:
        stop = call.settings["stop"][1] if "stop" in call.settings else session.policy.sampling.stop or ()
        try:
            message = answer_message(call, reply, session.parser, (stop,) if isinstance(stop, str) else stop)
        except Exception as error:  # a parser's own, of what a model may write: the client gets the text
            session.policy.counts["endpoint_unparsed"] += 1
            _log.info("an answer was not parsed, and is sent as text: %r", error)
            return {"role": "assistant", "content": str(reply)}
        if message != {"role": "assistant", "content": str(reply)}:
            reply.message = plain_message(message)  # which the client sends back
        return message

    def _note_replaced(self, session: Session, call: Call) -> None:
        ours = session.policy.sampling
        replaced = {name: value for name, value in call.replaced.items() if value != getattr(ours, name)}
        if not replaced:
            return
        session.policy.counts["endpoint_temperature"] += 1
        if not self._warned:
            self._warned = True
            _log.warning(
                "A client asked the endpoint for %s: the run's way of sampling is used in its place, here and in all "
                "later calls (%r).",
                *(", ".join(f"{name}={value!r}" for name, value in replaced.items()), ours),
            )


def _parsed(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {error}") from error
