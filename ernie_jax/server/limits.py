"""Rate limits: token buckets that hold what may be used in a minute and fill evenly."""

from __future__ import annotations

import math
from collections.abc import Callable

# Moments are sums of floats; a bucket that misses its mark by so many seconds has reached it.
_TOLERANCE = 1e-6


class Bucket:
    """Hold up to `per_minute` units, full at first; all its state is the moment when it is full again.

    Args:
      unit: "requests" or "tokens", as OpenAI's headers name it.
      clock: tells seconds, from any origin.
    """

    def __init__(self, unit: str, per_minute: int, clock: Callable[[], float]):
        self.unit, self.capacity = unit, per_minute
        self._rate = per_minute / 60
        self._clock = clock
        self._full_at = -math.inf

    def wait(self, amount: float) -> float:
        """Return the seconds until so much is there; infinity if it never will be."""
        if amount > self.capacity:
            return math.inf
        seconds = self._reset() - (self.capacity - amount) / self._rate
        return seconds if seconds > _TOLERANCE else 0.0

    def take(self, amount: float, age: float = 0.0) -> None:
        """Take so much, there or not; a negative amount gives back. `age`: it happened so many seconds ago."""
        self._full_at = max(self._full_at, self._clock() - age) + amount / self._rate

    @property
    def remaining(self) -> int:
        return max(0, math.floor(self.capacity - self._reset() * self._rate + _TOLERANCE))

    def headers(self) -> dict[str, str]:
        """Return OpenAI's three headers of this limit."""
        return {
            f"x-ratelimit-limit-{self.unit}": str(self.capacity),
            f"x-ratelimit-remaining-{self.unit}": str(self.remaining),
            f"x-ratelimit-reset-{self.unit}": duration(self._reset()),
        }

    def _reset(self) -> float:
        return max(0.0, self._full_at - self._clock())


def duration(seconds: float) -> str:
    """Write seconds as OpenAI's headers do: 120ms, 7.66s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000 - _TOLERANCE)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
