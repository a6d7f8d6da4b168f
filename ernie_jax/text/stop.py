"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Iterable

from ernie_jax.errors import UserError


class StopStringMatcher:
    """Cut a stream of text before the first stop string, however the stream is cut into pieces.

    The stop string that is complete first wins, the longer one if two end together. Text that could be the beginning
    of a stop string is held back until it is certain.

    Attributes:
      stopped: whether a stop string was found; nothing is emitted any more.

    Raises:
      UserError: if a stop string is empty.
    """

    def __init__(self, stop_strings: Iterable[str]):
        self._stop_strings = tuple(stop_strings)
        if not all(self._stop_strings):
            raise UserError("a stop string must not be empty")
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next text; return what can be shown now, and whether a stop string was found."""
        if self.stopped:
            return "", True
        if not self._stop_strings:
            return text, False
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if found:
            self._held, self.stopped = "", True
            return text[: min(found)[1]], True
        certain = len(text) - max((overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """End the stream: return the text held back, which is no stop string after all."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop` without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
