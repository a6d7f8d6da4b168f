"""From tokens to what is sent: text, stop strings, parts of the answer, log-probabilities and usage."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np

from ernie_jax.engine import SamplingParams, TokenEvent
from ernie_jax.server.hooks import NoMetrics
from ernie_jax.server.protocol import TokenScore, Usage
from ernie_jax.server.runner import TokenStream
from ernie_jax.text import TextStream, Tokenizer
from ernie_jax.text.answer import AnswerFormat, AnswerParser, Event


class Choice:
    """One answer in the making.

    Attributes:
      index: among the answers to the request.
      reason: why it ended, "stop" or "length"; None while it goes on.
      tokens, reasoning_tokens: how many it has so far.
      cached: how many tokens of its prompt were found in the cache.
      calls: how many tool calls there were.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        stop_ids: frozenset[int],
        form: AnswerFormat | None = None,
        keep: frozenset[int] = frozenset(),
    ):
        """Begin.

        Args:
          stop_ids: the model's own.
          form: what a chat's answer may consist of; None for text that is given as it is.
          keep: special tokens that are text for the parser.
        """
        self.index = index
        self.reason: str | None = None
        self.tokens = 0
        self.reasoning_tokens = 0
        self.cached = 0
        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else stop_ids)
        self._text = TextStream(tokenizer, params.stop, strip_space=form is not None, keep=keep)
        self._parser = AnswerParser(form or AnswerFormat())
        self._with_scores = params.logprobs
        self._scores: deque[tuple[int, TokenScore]] = deque()  # of text that is not certain yet, with its start

    @property
    def calls(self) -> int:
        return self._parser.calls

    def push(self, token: TokenEvent) -> tuple[list[Event], list[TokenScore]]:
        """Take the next token; return what is certain now, and the log-probabilities of the text that is.

        When `reason` is set the answer is over, also if the engine does not know it.
        """
        self.tokens += 1
        self.cached = token.cached_tokens
        self.reasoning_tokens += self._parser.in_reasoning
        # A grammar may end an answer with a token that is text.
        ends = token.finish_reason == "stop" and token.token in self._stop_ids
        start = self._text.decoded
        text = self._text.push(None if ends else token.token, last=token.finish_reason is not None)
        if self._with_scores and not ends:
            self._scores.append((start, TokenScore(token.token, token.logprob, token.top_logprobs)))
        events = self._parser.feed(text)
        self.reason = "stop" if self._text.stopped else token.finish_reason
        if self.reason:
            events += self._parser.finish(truncated=self._text.stopped or self.reason == "length")
        elif self._parser.over:
            self.reason = "stop"
        scores = []
        while self._scores and (self._scores[0][0] < self._text.shown or (self.reason and not self._text.stopped)):
            scores.append(self._scores.popleft()[1])
        return events, scores


class Piece(NamedTuple):
    """What a request's answers have come to meanwhile: a part of one of them.

    Attributes:
      experts: of every token that came, if asked for: also of one that ends the answer or whose text is held back.
    """

    choice: Choice
    events: list[Event]
    scores: list[TokenScore]
    experts: list[np.ndarray]


class Answers:
    """The answers to a request; iterate for their pieces, and close in the end.

    Args:
      prompts: how long each prompt is; the choices are numbered prompt by prompt.
      settle: awaited once all have ended, and before the iteration does.
    """

    def __init__(
        self,
        stream: TokenStream,
        choices: Sequence[Choice],
        prompts: Sequence[int],
        metrics: NoMetrics,
        settle: Callable[[], Awaitable[None]],
    ):
        self.choices = choices
        self._stream = stream
        self._prompts = prompts
        self._metrics = metrics
        self._settle = settle
        self._last = [time.monotonic()] * len(choices)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async for batch in self._stream:
            pieces: dict[int, Piece] = {}
            now = time.monotonic()
            for index, token in batch:
                choice = self.choices[index]
                if choice.reason:
                    continue
                observe = self._metrics.observe_token if choice.tokens else self._metrics.observe_first_token
                observe(now - self._last[index])
                self._last[index] = now
                events, scores = choice.push(token)
                piece = pieces.setdefault(index, Piece(choice, [], [], []))
                piece.events.extend(events)
                piece.scores.extend(scores)
                if token.experts is not None:
                    piece.experts.append(token.experts)
                if choice.reason:
                    self._stream.cancel(index)
            for piece in pieces.values():
                yield piece
        await self._settle()

    def close(self) -> None:
        """End what has not ended."""
        self._stream.close()

    @property
    def usage(self) -> Usage:
        """Count the tokens so far; a prompt counts once, however many answers it has."""
        n = len(self.choices) // len(self._prompts)
        return Usage(
            prompt=sum(self._prompts),
            completion=sum(choice.tokens for choice in self.choices),
            cached=sum(choice.cached for choice in self.choices[::n]),
            reasoning=sum(choice.reasoning_tokens for choice in self.choices),
        )


def score_prompt(logits: np.ndarray, prompt: Sequence[int], top: int) -> list[TokenScore]:
    """Return the scores of a prompt's tokens, from the logits [T, V] after each."""
    scores = [TokenScore(prompt[0], None)]
    for row, token in zip(logits[:-1], prompt[1:], strict=True):
        row = row.astype(np.float64)
        largest = row.max()
        logprobs = row - largest - np.log(np.exp(row - largest).sum())
        best = np.argpartition(-logprobs, top)[:top] if top else []
        pairs = sorted(((int(i), float(logprobs[i])) for i in best), key=lambda pair: -pair[1])
        scores.append(TokenScore(token, float(logprobs[token]), tuple(pairs)))
    return scores
