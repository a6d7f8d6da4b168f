"""What an engine is handed and what it tells."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "error"]


class Grammar(Protocol):
    """What a sequence may say next. It belongs to one request, and every process of a run has its own.

    Attributes:
      free: every token may come next, so that no mask is needed.
      finished: nothing can follow.
    """

    free: bool
    finished: bool

    def mask(self, out: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, and clear the others.

        Args:
          out: [ceil(V / 32)] int32: bit i % 32 of word i // 32 is token i. At least one must be set.

        Raises:
          UserError: if the grammar cannot go on, which ends its sequence.
        """

    def accept(self, token: int) -> bool:
        """Go on by a token; False if it may not come next."""


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One new token of a request; `finish_reason` is set on its last.

    Attributes:
      cached_tokens: how many tokens of the request's prompt were found in the cache.
      experts: [L, k], chosen in each layer with experts in the pass that this token came out of, if asked for.
      problem: what was wrong if the reason is "error"; the token is none of the answer's then.
    """

    request: int
    token: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    cached_tokens: int = 0
    experts: np.ndarray | None = None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine holds now, and totals since its start.

    Attributes:
      running, waiting: sequences now.
      free_pages, cached_pages, used_pages: add up to the whole cache; cached ones are unused but known, and are given
        out when no free ones are left.
      preemptions: how often a sequence gave up its pages to compute them again.
      prompt_tokens: of admitted requests, of which `cached_tokens` were found in the cache.
      generated_tokens: read back.
      steps: dispatched.
    """

    running: int
    waiting: int
    free_pages: int
    cached_pages: int
    used_pages: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int


class Progress(NamedTuple):
    """How far a request is: tokens of its prompt, how many of them are computed, and how many of those were cached."""

    prompt_tokens: int
    computed: int
    cached: int
