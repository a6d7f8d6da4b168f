"""HTTP apart from what is asked and answered: bodies, errors, event streams, request ids and the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie_jax.server.hooks import Caller, NoLedger, NoMetrics, OpenAccess
from ernie_jax.server.ledger import OPEN, Row
from ernie_jax.server.logs import Log
from ernie_jax.server.protocol import ApiError, Usage

_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}")
# nginx and its kin would otherwise keep events until there are more of them.
_EVENT_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
_EVENT_HEADERS["x-accel-buffering"] = "no"
# Most clients read an answer only once all is sent, and lose it if the connection is closed before.
_DISCARDED = 64 * 2**20
_CLOSED = 499  # nginx's status for a client that went away, in the log only


class Disconnected(Exception):
    """The client has gone away."""


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    # Half of a surrogate pair, echoed from a request, can't be UTF-8: then all is escaped.
    try:
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        content = json.dumps(body, separators=(",", ":")).encode()
    return Response(content, status, dict(headers or {}), "application/json")


def error_response(error: ApiError) -> Response:
    """Return an error in OpenAI's shape."""
    return json_response(error.body, error.status, error.headers)


async def routing_error(request: Request, error: HTTPException) -> Response:
    """Answer what no route takes."""
    path = request.url.path
    if error.status_code == 404:
        found = ApiError(f"Unknown request URL: {request.method} {path}.", None, "unknown_url", 404)
    elif error.status_code == 405:
        message = f"Method {request.method} is not allowed for {path}."
        found = ApiError(message, None, "method_not_allowed", 405, error.headers)
    else:
        found = ApiError(f"{error.detail}.", None, None, error.status_code, error.headers)
    return error_response(found)


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
      ApiError: if it has more than `limit` bytes.
      Disconnected: if it does not come to its end.
    """
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body = message.get("body", b"")
        size += len(body)
        if size <= limit:
            parts.append(body)
        elif size > limit + _DISCARDED or not message.get("more_body"):
            words = f"The body of the request is larger than {limit} bytes."
            raise ApiError(words, None, "request_too_large", 413, {"connection": "close"})
        if not message.get("more_body"):
            return b"".join(parts)


def content_length(headers: Headers) -> int:
    """Return how long a body claims to be; 0 if it does not say."""
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


async def until_disconnected[T](receive: Receive, work: Awaitable[T]) -> T:
    """Await work for a client that is there; when it goes away the work is cancelled.

    Raises:
      Disconnected: if the client goes away.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        for each in (task, watcher):
            each.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class EventStream(Response):
    """Send server-sent events while the client listens.

    Args:
      events: already encoded.
      close: called in the end, however it comes.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], headers: Mapping[str, str]):
        super().__init__(None, 200, dict(headers) | _EVENT_HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnected(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Account:
    """One request's row in the ledger.

    Attributes:
      usage: what the request came to so far; None if it has not come to the engine.
    """

    def __init__(self, ledger: NoLedger, model: str, request_id: str):
        self.usage: Usage | None = None
        self._ledger = ledger
        self._about = {"request_id": request_id, "model": model}
        self._row: Row | None = None
        self._written: tuple[Usage, int] | None = None

    def open(self, caller: Caller, endpoint: str, usage: Usage) -> None:
        """Take down that the request has begun."""
        self._about |= {"caller": caller, "endpoint": endpoint}
        self._write(usage, OPEN)

    def close(self, usage: Usage, status: int = 200) -> None:
        """Take down what the request came to."""
        self._write(usage, status)

    async def kept(self) -> None:
        """Wait until what was taken down last will outlive the process.

        Raises:
          ApiError: 503, if it can't be kept.
        """
        if self._row:
            try:
                await asyncio.wrap_future(self._row)
            except Exception as error:
                words = "The server's ledger can't be written, and nothing is answered without it; try again later."
                raise ApiError(words, code="ledger_failed", status=503) from error

    def _write(self, usage: Usage, status: int) -> None:
        self.usage = usage
        if self._written != (usage, status):
            self._written = usage, status
            self._row = self._ledger.record(**self._about, usage=usage, status=status, replaces=self._row)


class Recorder:
    """Give every request an id, and log and count it, and write down its use, when it is over.

    Endpoints find an `account` in the request's state, and may leave `caller` and `endpoint` there.
    """

    def __init__(self, app: ASGIApp, model: str, access: OpenAccess, log: Log, ledger: NoLedger, metrics: NoMetrics):
        self._app = app
        self._model = model
        self._access = access
        self._log = log
        self._ledger = ledger
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        account = state["account"] = Account(self._ledger, self._model, request_id)
        start, status = time.monotonic(), _CLOSED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Disconnected:
            status = _CLOSED  # also where 200 was sent before
        finally:
            seconds = time.monotonic() - start
            endpoint = state.get("endpoint", "other")
            caller, usage = state.get("caller"), account.usage
            if usage:
                account.close(usage, status)
            elif caller:
                self._access.settle(caller, 0)
            self._metrics.count_request(endpoint, status, seconds)
            self._log.request(request_id, caller and caller.name, endpoint, status, seconds, usage)
