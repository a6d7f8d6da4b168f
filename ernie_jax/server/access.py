"""Who may use the server, and how much.

caller = await access.admit(headers, estimated_tokens)
... answer, with caller.headers() ...
access.settle(caller, used_tokens)
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

from ernie_jax.errors import UserError
from ernie_jax.server.keys import Keys
from ernie_jax.server.ledger import Ledger
from ernie_jax.server.limits import Bucket, duration
from ernie_jax.server.protocol.errors import ApiError

ANONYMOUS = "anonymous"


class AccessError(ApiError):
    """Turn a caller away.

    Attributes:
      headers: of the response.
      retry_after: whole seconds after which the same request will be admitted, if nothing comes between; None if never.
    """

    def __init__(
        self, message: str, code: str, status: int, headers: Mapping[str, str], retry_after: int | None = None
    ):
        super().__init__(message, None, code, status)
        self.headers = dict(headers)
        self.retry_after = retry_after


@dataclasses.dataclass(eq=False)
class Caller:
    """Stand for one admitted request.

    Attributes:
      name: of the key, never the key itself.
      taken_tokens: what the request has taken from the limit so far.
    """

    name: str
    taken_tokens: int
    _buckets: tuple[Bucket, ...] = dataclasses.field(repr=False)

    def headers(self) -> dict[str, str]:
        """Return OpenAI's x-ratelimit-* headers as the limits stand now; none without limits."""
        return _headers(self._buckets)


class Access:
    """Check keys and rate limits; to be used from one thread, the event loop's.

    Args:
      keys: without any, everybody has access as "anonymous", and shares the limits.
      requests_per_minute, tokens_per_minute: of each name; None is no limit.
      ledger: what was used in the minute before a restart counts on; None to begin with full limits.
      clock: tells seconds, from any origin.

    Raises:
      UserError: if a limit is none.
    """

    def __init__(
        self,
        keys: Keys,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        for unit, limit in self._limits.items():
            if limit is not None and limit < 1:
                raise UserError(f"{unit}_per_minute={limit}: give at least 1, or nothing for no limit")
        self._keys = keys
        self._clock = clock
        self._buckets: dict[str, tuple[Bucket, ...]] = {}
        for age, name, tokens in ledger.recent(60) if ledger else ():
            _take(self._of(name), {"requests": 1, "tokens": tokens}, age)

    async def admit(self, headers: Mapping[str, str], estimated_tokens: int) -> Caller:
        """Let a request in and take what it will use from the limits.

        Args:
          headers: of the request.
          estimated_tokens: of prompt and answer together; `settle` corrects it.

        Raises:
          AccessError: 401 without a key that is known, 429 beyond a limit, and then nothing is taken.
        """
        name = self._identify(headers)
        buckets, amounts = self._of(name), {"requests": 1, "tokens": estimated_tokens}
        waits = [bucket.wait(amounts[bucket.unit]) for bucket in buckets]
        if any(waits):
            seconds, bucket = max(zip(waits, buckets, strict=True), key=lambda pair: pair[0])
            raise _beyond(bucket, amounts[bucket.unit], seconds, _headers(buckets))
        _take(buckets, amounts)
        return Caller(name, estimated_tokens, buckets)

    def settle(self, caller: Caller, used_tokens: int) -> None:
        """Correct what a request has taken to what it used; of several calls the last counts."""
        _take(caller._buckets, {"requests": 0, "tokens": used_tokens - caller.taken_tokens})
        caller.taken_tokens = used_tokens

    def _identify(self, headers: Mapping[str, str]) -> str:
        if not self._keys:
            return ANONYMOUS
        given = next((value for name, value in headers.items() if name.lower() == "authorization"), "")
        scheme, _, key = given.strip().partition(" ")
        challenge = {"www-authenticate": "Bearer"}
        if scheme.lower() != "bearer" or not key.strip():
            message = "You didn't provide an API key; send it in the header 'Authorization: Bearer YOUR_KEY'."
            raise AccessError(message, "missing_api_key", 401, challenge)
        name = self._keys.find(key.strip())
        if name is None:
            raise AccessError("Incorrect API key provided.", "invalid_api_key", 401, challenge)
        return name

    def _of(self, name: str) -> tuple[Bucket, ...]:
        if name not in self._buckets:
            limits = self._limits.items()
            self._buckets[name] = tuple(Bucket(unit, limit, self._clock) for unit, limit in limits if limit is not None)
        return self._buckets[name]


def _take(buckets: tuple[Bucket, ...], amounts: Mapping[str, int], age: float = 0.0) -> None:
    for bucket in buckets:
        bucket.take(amounts[bucket.unit], age)


def _headers(buckets: tuple[Bucket, ...]) -> dict[str, str]:
    return {name: value for bucket in buckets for name, value in bucket.headers().items()}


def _beyond(bucket: Bucket, amount: int, seconds: float, headers: dict[str, str]) -> AccessError:
    limit, code = f"{bucket.unit} per minute: limit {bucket.capacity}", "rate_limit_exceeded"
    if seconds == math.inf:
        # OpenAI's clients would try again by themselves, in vain.
        message = f"Request too large for the {limit}, requested {amount}; ask for fewer tokens or shorten the prompt."
        return AccessError(message, code, 429, headers | {"x-should-retry": "false"})
    retry_after = math.ceil(seconds)
    left = f"left {bucket.remaining}, requested {amount}"
    message = f"Rate limit reached for {limit}, {left}; try again in {duration(seconds)}."
    return AccessError(message, code, 429, headers | {"retry-after": str(retry_after)}, retry_after)
