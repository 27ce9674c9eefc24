"""The endpoint's HTTP server, on the loopback interface, with limits and deadlines for what it reads and sends."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import socket
from collections.abc import Awaitable, Callable, Collection

import msgspec
from aiohttp import web

from lightning_rft.explorer.worker.openai_requests import Refusal
from lightning_rft.explorer.worker.openai_responses import MODELS
from lightning_rft.explorer.worker.session import Response, Session

__all__ = ["HTTPServer"]

_log = logging.getLogger(__name__)

_MOST_BYTES = 16 * 2**20  # of a request
_READ_S = _WRITE_S = 30.0  # for a request's body, and for a client that reads its response
_BACKLOG = 1024  # clients that wait for their connection
_MODELS = "/v1/models"


class HTTPServer:
    """Listens on a port of 127.0.0.1 from the start; clients wait in the socket's queue until it serves them.

    Args:
        paths: Of the calls.
        find: The session of an API key.
        respond: The response to a session's call of a path, with a body, at which try of the client.
    """

    def __init__(
        self,
        paths: Collection[str],
        find: Callable[[str], Session],
        respond: Callable[[Session, str, bytes, int], Awaitable[Response]],
    ) -> None:
        self._methods = {**dict.fromkeys(paths, "POST"), _MODELS: "GET"}
        self._find = find
        self._respond = respond
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        self._http = web.Server(self._handle, handler_cancellation=True, access_log=None)
        # In a context of its own: what a sample starts ends with that sample.
        context = contextvars.Context()
        self._serving: asyncio.Task[None] = context.run(asyncio.ensure_future, self._serve())
        self._serving.add_done_callback(lambda _: self._socket.close())  # also of one that never began

    @property
    def url(self) -> str:
        """Address without a path."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def stop(self) -> None:
        """Ends the server and its connections, with what runs for them."""
        self._serving.cancel()
        for connection in self._http.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._http, sock=self._socket, backlog=_BACKLOG, start_serving=False)
        try:
            await server.serve_forever()
        finally:
            server.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        session: Session | None = None
        try:
            session = self._find(request.headers.get("Authorization", "").removeprefix("Bearer "))
            response = web.Response(**(await self._response(request, session))._asdict())
        except Refusal as refusal:
            if session is not None and refusal.status != 401:
                session.policy.counts["endpoint_refused"] += 1
            response = _refused(refusal)
        except Exception as error:  # of the engine, which ends this process, or of this package
            _log.exception("a call of the endpoint failed")
            response = _refused(Refusal(f"{type(error).__name__}: {error}", status=500))
        try:
            async with asyncio.timeout(_WRITE_S):
                await response.prepare(request)
                await response.write_eof()
        except (TimeoutError, ConnectionError):
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _response(self, request: web.BaseRequest, session: Session) -> Response:
        method = self._methods.get(request.path)
        if method is None:
            raise Refusal(f"no such path: {request.path}; there are {', '.join(self._methods)}", status=404)
        if request.method != method:
            raise Refusal(f"{request.path} takes {method}, not {request.method}", status=405)
        if request.path == _MODELS:
            return Response(msgspec.json.encode(MODELS), "application/json")
        body = await _body(request)
        tries = request.headers.get("x-stainless-retry-count", "0")
        return await self._respond(session, request.path, body, int(tries) if tries.isdecimal() else 0)


async def _body(request: web.BaseRequest) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(_READ_S):
            while len(body) <= _MOST_BYTES and (part := await request.content.readany()):
                body += part
    except TimeoutError:
        raise Refusal(f"the body did not arrive within {_READ_S:g} seconds", status=408) from None
    except web.RequestPayloadError as error:
        raise Refusal(f"the body cannot be read: {error}") from error
    if len(body) > _MOST_BYTES:
        raise Refusal(f"the body is larger than {_MOST_BYTES} bytes", status=413)
    return bytes(body)


def _refused(refusal: Refusal) -> web.Response:
    return web.Response(status=refusal.status, body=msgspec.json.encode(refusal.body), content_type="application/json")
