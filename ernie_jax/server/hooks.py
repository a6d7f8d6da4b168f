"""What the server asks and tells others: who may use it, what was used, how fast it was. These do little."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from ernie_jax.engine import Stats
from ernie_jax.server.ledger import Entry, Ledger, Row
from ernie_jax.server.protocol import Usage


class Caller(Protocol):
    """Who sent a request: `name` is that of the key, never the key itself."""

    name: str

    def headers(self) -> Mapping[str, str]:
        """Return headers for the response, such as x-ratelimit-*."""


class Anybody:
    """Stand for every caller where there are no keys."""

    name = "anonymous"

    def headers(self) -> Mapping[str, str]:
        return {}


class OpenAccess:
    """Let everybody in."""

    async def admit(self, headers: Mapping[str, str], estimated_tokens: int) -> Caller:
        """Let a request in, before its body is read.

        Raises:
          ApiError: 401 or 429.
        """
        return Anybody()

    def settle(self, caller: Caller, used_tokens: int) -> None:
        """Correct the estimate."""


class NoLedger:
    """Write down nothing."""

    def record(
        self,
        caller: Caller,
        request_id: str,
        endpoint: str,
        model: str,
        usage: Usage,
        status: int,
        replaces: Row | None = None,
    ) -> Row | None:
        """Take down what a request has used: when it begins (status OPEN), ends, or is broken off (499).

        Args:
          replaces: what was returned for the request before.

        Returns:
          A future that is done when it is kept for good; None if there is nothing to wait for.
        """
        return None


class FileLedger(NoLedger):
    """Write it into an SQLite file."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger

    def record(
        self,
        caller: Caller,
        request_id: str,
        endpoint: str,
        model: str,
        usage: Usage,
        status: int,
        replaces: Row | None = None,
    ) -> Row | None:
        tokens = usage.prompt, usage.cached, usage.completion
        entry = Entry(time.time(), request_id, caller.name, model, endpoint, *tokens, status)
        return self._ledger.record(entry, replaces)


class NoMetrics:
    """Count nothing."""

    def observe_first_token(self, seconds: float) -> None:
        """Time the first token of an answer, since its request came."""

    def observe_token(self, seconds: float) -> None:
        """Time a later token, since the one before."""

    def count_tokens(self, prompt: int, cached: int, generated: int) -> None:
        """Count a request's tokens; the cached ones are among the prompt's."""

    def count_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a finished request; `endpoint` is the route's path."""

    def set_stats(self, stats: Stats) -> None:
        """Show what the engine holds now."""

    def set_experts(self, load: Mapping[int, Sequence[int]]) -> None:
        """Show by layer how many tokens have chosen each of its experts."""

    def render(self) -> tuple[str, bytes]:
        """Return the content type and body of /metrics."""
        return "text/plain; version=0.0.4; charset=utf-8", b""
