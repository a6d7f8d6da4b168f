"""A server that plays scripts to the page, where the embedded model can't do what is tested."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from ernie_jax.server.chat_page import page_routes
from ernie_jax.server.http import Disconnected, EventStream, error_response
from ernie_jax.server.listen import bind
from ernie_jax.server.protocol import ApiError

CARD = {
    "id": "ernie-scripted",
    "max_model_len": 131072,
    "num_experts": 64,
    "default_sampling": {"temperature": 0.8, "top_p": 0.95},
}
USAGE = {"prompt_tokens": 1234, "completion_tokens": 30, "prompt_tokens_details": {"cached_tokens": 1024}}


def delta(*, reason: str | None = None, routing: dict | None = None, **fields: Any) -> dict[str, Any]:
    """Return a chunk; `reason` ends the answer."""
    choice = {"index": 0, "delta": fields, "finish_reason": reason}
    return {"choices": [choice if routing is None else choice | {"routing": routing}]}


def call(index: int, arguments: str, **start: str) -> dict[str, Any]:
    """Return a piece of a tool call; `id` and `name` begin it."""
    piece = {"index": index, "function": {"arguments": arguments}}
    if start:
        piece |= {"id": start["id"], "type": "function"}
        piece["function"]["name"] = start["name"]
    return piece


def end(reason: str = "stop") -> list:
    return [delta(reason=reason), {"choices": [], "usage": USAGE}, "[DONE]"]


def says(*texts: str) -> list:
    """Return an answer of these pieces."""
    return [delta(role="assistant", content=""), *(delta(content=text) for text in texts), *end()]


class _Played(EventStream):
    async def __call__(self, *args) -> None:
        with contextlib.suppress(Disconnected):
            await super().__call__(*args)


@dataclasses.dataclass
class Scripted:
    """A server that does what it is told.

    Attributes:
      answers: what the next requests get, in order: an error, or a stream's chunks, pauses in seconds, or None to wait
        until the client has gone.
      card: of the model.
      key: that requests must have, if any.
      requests: the bodies it got.
      gone: set when a client went away in the middle of an answer.
    """

    url: str
    card: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(CARD))
    key: str | None = None
    answers: list[ApiError | list] = dataclasses.field(default_factory=list)
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    gone: threading.Event = dataclasses.field(default_factory=threading.Event)

    def begin(self) -> Scripted:
        """Forget what it was told before."""
        self.__init__(self.url)
        return self

    async def models(self, request: Request) -> Response:
        return self._refuse(request) or JSONResponse({"data": [self.card]})

    async def chat(self, request: Request) -> Response:
        self.requests.append(await request.json())
        if refusal := self._refuse(request):
            return refusal
        answer = self.answers.pop(0)
        return error_response(answer) if isinstance(answer, ApiError) else _Played(self._play(answer), lambda: None, {})

    def _refuse(self, request: Request) -> Response | None:
        if self.key in (None, request.headers.get("authorization", "").removeprefix("Bearer ")):
            return None
        return error_response(ApiError("You didn't provide an API key.", None, "missing_api_key", 401))

    async def _play(self, steps: list) -> AsyncIterator[bytes]:
        try:
            for step in steps:
                if step is None:
                    await asyncio.Event().wait()
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield f"data: {step if isinstance(step, str) else json.dumps(step)}\n\n".encode()
        except asyncio.CancelledError:
            self.gone.set()
            raise


@contextlib.contextmanager
def playing() -> Iterator[Scripted]:
    """Run a scripted server."""
    socket = bind("127.0.0.1", 0)
    scripted = Scripted(f"http://127.0.0.1:{socket.getsockname()[1]}")
    routes = [
        *page_routes(),
        Route("/v1/models", scripted.models),
        Route("/v1/chat/completions", scripted.chat, methods=["POST"]),
    ]
    app = Starlette(routes=[*routes, Mount("/a/prefix", routes=routes)])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield scripted
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
