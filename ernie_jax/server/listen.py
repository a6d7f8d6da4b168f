"""The HTTP server under the application: it listens, and ends gracefully on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn

from ernie_jax import distributed
from ernie_jax.errors import UserError
from ernie_jax.server.app import App
from ernie_jax.server.protocol import ApiError
from ernie_jax.server.runner import Runner

_LAST_WORDS_SECONDS = 5  # for connections, once the answers on them have ended


class Listener(uvicorn.Server):
    """Serve until SIGTERM or SIGINT, then let what runs end.

    While it drains new requests get 503, so that a balancer sends them elsewhere. A second signal ends at once.
    Other processes that follow the engine pass the first signal on that they get, as reports.

    Args:
      drain_seconds: how long running requests may still take.
      notify: called with a sentence for the user.
    """

    def __init__(
        self,
        app: App,
        runner: Runner,
        drain_seconds: float,
        notify: Callable[[str], None] = lambda words: None,
        certificate: str | None = None,
        key: str | None = None,
    ):
        super().__init__(
            uvicorn.Config(
                app.asgi,
                log_config=None,
                access_log=False,
                server_header=False,
                ssl_certfile=certificate,
                ssl_keyfile=key,
                timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
                ws="none",
            )
        )
        self._runner = runner
        self._drain_seconds = drain_seconds
        self._notify = notify
        self._draining: asyncio.Task | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals in the event loop, instead of uvicorn's way, which ends the process by them."""
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        with contextlib.suppress(ValueError, RuntimeError):  # no signals reach other threads than the first
            for number in signals:
                loop.add_signal_handler(number, self.end)
        yield

    def end(self) -> None:
        """Begin to end, or end at once if that has begun; in the event loop's thread."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look at what other processes report, ten times a second."""
        if distributed.take_reports() and self._draining is None:
            self.end()
        if self._runner.failure:
            self.should_exit = True
        return await super().on_tick(counter)

    def abandon(self) -> None:
        """End with all answers, whatever the engine does: another process has ended; in the event loop's thread."""
        error = ApiError("The server has lost one of its processes; try again later.", None, "engine_failed", 503)
        self._runner.abandon(error)
        self.should_exit = True

    async def _drain(self) -> None:
        if self._runner.open:
            self._notify(f"ending: {self._runner.open} answers have {self._drain_seconds:g} seconds; again to end now")
        if not await self._runner.drain(self._drain_seconds):
            self._notify(f"gave up {self._runner.open} answers")
            await asyncio.to_thread(self._runner.stop)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Take an address; port 0 takes a free one.

    Raises:
      UserError: if it can't be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from None
    return listener


def check_certificate(certificate: str, key: str) -> None:
    """Check that two PEM files are a certificate, perhaps with its chain, and its key.

    Raises:
      UserError: if they are not, or the key asks for a password.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:  # ssl.SSLError among them
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror or error
        raise UserError(
            f"--tls_cert={certificate} --tls_key={key}: not a PEM certificate and its key without a password ({reason})"
        ) from None
