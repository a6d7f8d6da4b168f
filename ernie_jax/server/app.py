"""The ASGI application: routes, and what they have in common."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ernie_jax.errors import UserError
from ernie_jax.server.chat_page import page_routes
from ernie_jax.server.endpoints import Generator
from ernie_jax.server.hooks import NoLedger, NoMetrics, OpenAccess
from ernie_jax.server.http import (
    Disconnected,
    Recorder,
    content_length,
    error_response,
    json_response,
    read_body,
    routing_error,
)
from ernie_jax.server.logs import Log
from ernie_jax.server.model import ServedModel
from ernie_jax.server.protocol import (
    ApiError,
    Fields,
    TokenizeRequest,
    model_not_found,
    parse_body,
    parse_detokenize,
)
from ernie_jax.server.runner import Runner
from ernie_jax.version import VERSION

BODY_LIMIT = 16 * 2**20
_LIMITS = ("limit", "remaining", "reset")  # what a browser's page may read of x-ratelimit-*
_BYTES_PER_TOKEN = 4  # of a request's body, for an estimate before it is read

_log = logging.getLogger(__name__)

Answer = Callable[[Request, Fields], Awaitable[Response]]


class App:
    """Serve one model.

    Attributes:
      asgi: the application; its lifespan starts and stops the runner.

    Args:
      access, ledger, metrics, log: see hooks; the defaults let everybody in and remember nothing.
      origins: web pages that browsers may call from; "*" for all.
      body_limit: bytes of a request's body.
      request_timeout: seconds a request may take; None is no limit.
    """

    def __init__(
        self,
        model: ServedModel,
        runner: Runner,
        *,
        access: OpenAccess | None = None,
        ledger: NoLedger | None = None,
        metrics: NoMetrics | None = None,
        log: Log | None = None,
        origins: Sequence[str] = (),
        body_limit: int = BODY_LIMIT,
        request_timeout: float | None = None,
    ):
        self._model = model
        self._runner = runner
        self._access = access or OpenAccess()
        self._metrics = metrics or NoMetrics()
        self._body_limit = body_limit
        generator = Generator(model, runner, self._access, self._metrics, request_timeout)
        routes = [
            self._get("/v1/models", self._models),
            self._get("/v1/models/{name:path}", self._one_model),
            self._post("/v1/chat/completions", generator.chat),
            self._post("/v1/completions", generator.completions),
            self._post("/v1/responses", generator.responses),
            self._post("/tokenize", self._tokenize),
            self._post("/detokenize", self._detokenize),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/version", self._version),
            Route("/metrics", self._show_metrics),
            *page_routes(),
        ]
        about = {"log": log or Log(), "ledger": ledger or NoLedger(), "metrics": self._metrics}
        middleware = [Middleware(Recorder, model=model.name, access=self._access, **about)]
        if origins:
            limits = [f"x-ratelimit-{what}-{unit}" for what in _LIMITS for unit in ("requests", "tokens")]
            exposed = ["x-request-id", "retry-after", *limits]
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=origins,
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                    expose_headers=exposed,
                )
            )
        handlers = {HTTPException: routing_error}
        self.asgi = Starlette(
            routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=self._lifespan
        )
        self.asgi.router.redirect_slashes = False

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._runner.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self._runner.stop)

    # Routes ---------------------------------------------------------------------------------------------------------

    def _post(self, path: str, answer: Answer) -> Route:
        async def read_and_answer(request: Request) -> Response:
            body = await read_body(request, self._body_limit)
            return await answer(request, await asyncio.to_thread(parse_body, body))

        return Route(path, self._guard(path, read_and_answer), methods=["POST"])

    def _get(self, path: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, self._guard(path, answer), methods=["GET"])

    def _guard(self, path: str, answer: Callable[[Request], Awaitable[Response]]):
        """Let callers in, and turn what is raised into answers."""

        async def endpoint(request: Request) -> Response:
            request.state.endpoint = path
            try:
                estimate = -(-content_length(request.headers) // _BYTES_PER_TOKEN)
                request.state.caller = await self._access.admit(request.headers, estimate)
                return await answer(request)
            except UserError as error:
                return error_response(ApiError.of(error))
            except Disconnected:
                raise
            except Exception as error:
                _log.error("%s failed", path, exc_info=error)
                return error_response(ApiError("The server had an error; its log tells more.", status=500))

        return endpoint

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model.card]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model.name:
            raise model_not_found(name, self._model.name)
        return json_response(self._model.card)

    async def _tokenize(self, request: Request, fields: Fields) -> Response:
        asked = TokenizeRequest.parse(fields)
        self._model.check_name(asked.model)
        tokenizer = self._model.tokenizer
        tokens = await asyncio.to_thread(self._model.encode, asked.prompt)
        texts = [tokenizer.piece_bytes(token).decode(errors="replace") for token in tokens] if asked.with_texts else []
        return json_response(asked.answer(tokens, texts, self._model.context))

    async def _detokenize(self, request: Request, fields: Fields) -> Response:
        tokens = parse_detokenize(fields)
        try:
            return json_response({"prompt": self._model.tokenizer.decode(tokens, skip_special=False)})
        except UserError as error:
            raise ApiError.of(error, "tokens") from None

    async def _health(self, request: Request) -> Response:
        """Say whether the process can still serve; a drain does not change that."""
        refusal = self._runner.refusal
        broken = refusal is not None and refusal.code == "engine_failed"
        return error_response(refusal) if broken else json_response({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        refusal = self._runner.refusal
        return error_response(refusal) if refusal else json_response({"status": "ready"})

    async def _version(self, request: Request) -> Response:
        return json_response({"version": VERSION})

    async def _show_metrics(self, request: Request) -> Response:
        self._metrics.set_stats(self._runner.stats)
        load = await asyncio.to_thread(self._runner.expert_load)
        if load is not None:
            self._metrics.set_experts(dict(zip(self._model.moe_layers, load.tolist(), strict=True)))
        kind, body = self._metrics.render()
        return Response(body, headers={"content-type": kind})
