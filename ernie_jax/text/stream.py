"""The text of an answer, token by token, up to its end or to a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from ernie_jax.text.stop import StopStringMatcher
from ernie_jax.text.tokenizer import IncrementalDetokenizer, Tokenizer


class TextStream:
    """Turn tokens into text that is certain: whole characters which belong to no stop string.

    Attributes:
      decoded: characters of all tokens so far, also those that are held back or cut off.
      shown: characters given out.

    Raises:
      UserError: if a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Iterable[str] = (),
        strip_space: bool = False,
        keep: frozenset[int] = frozenset(),
    ):
        self.decoded = 0
        self.shown = 0
        self._detokenizer = IncrementalDetokenizer(tokenizer, strip_space=strip_space, keep=keep)
        self._matcher = StopStringMatcher(stop)

    @property
    def stopped(self) -> bool:
        """Tell whether a stop string was found; no text comes behind it."""
        return self._matcher.stopped

    def push(self, token: int | None, last: bool = False) -> str:
        """Take the next token, None if it is no text, and return what is certain now: everything, if it is the last."""
        text = "" if token is None else self._detokenizer.push(token)
        if last:
            text += self._detokenizer.flush()
        self.decoded += len(text)
        text, stopped = self._matcher.feed(text)
        if last and not stopped:
            text += self._matcher.flush()
        self.shown += len(text)
        return text
