"""Engine: sequences in, tokens out, with the device always at least one step ahead of the host.

The host decides a step from what it knows without waiting (lengths, pages, budgets), dispatches it, and reads the
tokens of an earlier one. A sequence that turns out to have stopped has by then a surplus token or two in flight, which
are dropped.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ernie_jax.engine import cache
from ernie_jax.engine.batching import Run, bucket, build_batch, take_chunks
from ernie_jax.engine.sampling import Features, SampleOutput, SamplerState, SamplingParams, build_rows
from ernie_jax.engine.step import DeviceStep, sample_rows, set_rows
from ernie_jax.errors import UserError
from ernie_jax.model import Ernie
from ernie_jax.ops import EXPERT_BACKENDS, RaggedBatch

FinishReason = Literal["stop", "length"]

_STEPS_AHEAD = 2
_PREFILL_ROWS = 8


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Size an Engine.

    Attributes:
      cache_tokens: tokens that the KV cache holds over all sequences; None takes what fits in the device's memory.
      max_sequences: sequences decoded at the same time.
      prefill_chunk: most prompt tokens of a step; None takes 2048 on a GPU, else 512.
      page_size: tokens of a cache page.
      expert_backend: a name of ops.EXPERT_BACKENDS; None chooses by the number of tokens.
    """

    cache_tokens: int | None = None
    max_sequences: int = 64
    prefill_chunk: int | None = None
    page_size: int = cache.PAGE_SIZE
    expert_backend: str | None = None

    def __post_init__(self):
        for name in ("cache_tokens", "max_sequences", "prefill_chunk", "page_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if self.expert_backend not in (None, *EXPERT_BACKENDS):
            raise UserError(
                f"ops: no expert backend {self.expert_backend!r}; choose one of {', '.join(EXPERT_BACKENDS)}"
            )


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One new token of a request; `finish_reason` is set on its last."""

    request: int
    token: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request on its way. `computed` and `sampled` count what was dispatched, `output` what was read back."""

    request: int
    prompt: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    most: int = 0  # new tokens, by the request or by the context length
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    sampled: int = 0
    output: list[int] = dataclasses.field(default_factory=list)
    finished: bool = False


@dataclasses.dataclass(frozen=True)
class _InFlight:
    sequences: list[tuple[int, _Sequence]]  # (row, sequence) of the rows that sampled
    out: SampleOutput


class Engine:
    """Generate for many requests at once over one paged cache.

    Raises:
      UserError: if the options do not suit the model or the device.
    """

    def __init__(
        self,
        model: Ernie,
        mesh: Mesh,
        options: EngineOptions | None = None,
        *,
        valid_vocab: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ):
        """Allocate the cache.

        Args:
          valid_vocab: ids from here on are never generated; default: the whole vocabulary.
          stop_ids: ids that end any sequence (unless it ignores them).
        """
        self.config = model.config
        options = options or EngineOptions()
        if options.prefill_chunk is None:
            # On a TPU, XLA's scatter of 2,048 tokens changes the layout of the whole cache; that of 512 does not.
            chunk = 2048 if mesh.devices.flat[0].platform == "gpu" else 512
            options = dataclasses.replace(options, prefill_chunk=chunk)
        self.options = options
        self.dtype = model.embed.weight.dtype
        self.valid_vocab = valid_vocab or self.config.vocab_size
        self.stop_ids = stop_ids
        most = options.max_sequences * self.config.max_position_embeddings
        tokens = options.cache_tokens or cache.default_cache_tokens(self.config, self.dtype, mesh.devices.flat[0], most)
        self.num_pages = -(-tokens // options.page_size) + 1  # the last is scratch, for padding
        self._max_pages = -(-self.config.max_position_embeddings // options.page_size)
        self._pages = cache.make_pages(self.config, self.dtype, self.num_pages, options.page_size, mesh)
        self._allocator = cache.PageAllocator(self.num_pages - 1)
        self._step = DeviceStep(model, mesh, options.expert_backend)
        self._last_tokens = jnp.zeros(options.max_sequences, jnp.int32)
        self._features = Features()
        self._sampler: SamplerState | None = None
        self._free_slots = list(range(options.max_sequences - 1, -1, -1))
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._in_flight: deque[_InFlight] = deque()
        self._requests = 0

    @property
    def cache_tokens(self) -> int:
        return (self.num_pages - 1) * self.options.page_size

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._in_flight)

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt of token ids and return the request's number.

        Raises:
          UserError: if the prompt is empty, holds an id outside the vocabulary, or does not fit the context or cache.
        """
        self.check(prompt, params)
        most = min(params.max_new_tokens, self.config.max_position_embeddings - len(prompt))
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        request, self._requests = self._requests, self._requests + 1
        self._waiting.append(_Sequence(request, prompt, params, stop_ids, seed, most))
        return request

    def cancel(self, request: int) -> None:
        """Drop a request; its pages are free at once. An unknown or finished one is ignored."""
        self._waiting = deque(s for s in self._waiting if s.request != request)
        for sequence in [s for s in self._running if s.request == request]:
            self._finish(sequence)

    def step(self) -> list[TokenEvent]:
        """Dispatch the next step if there is one, and return the tokens that have arrived meanwhile."""
        events = self._admit()
        dispatched = self._dispatch()
        if len(self._in_flight) > _STEPS_AHEAD or (self._in_flight and not dispatched):
            events += self._collect()
        return events

    def score(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        """Yield (index, log-probabilities of tokens 1, 2, ... each given those before) of each prompt as it is done.

        Raises:
          UserError: as `submit`.
          RuntimeError: while requests are running.
        """
        if self.has_work:
            raise RuntimeError("score needs an idle engine")
        for prompt in prompts:
            self.check_length(prompt)
        waiting = deque(_Sequence(i, prompt, SamplingParams()) for i, prompt in enumerate(prompts))
        active: list[_Sequence] = []
        parts: dict[int, list[tuple[jax.Array, slice]]] = {i: [] for i in range(len(prompts))}
        try:
            while waiting or active:
                while waiting and len(active) < _PREFILL_ROWS and self._reserve(waiting[0], len(waiting[0].prompt)):
                    active.append(waiting.popleft())
                chosen, batch = self._prefill_batch(active)
                targets = np.zeros(len(batch.tokens), np.int32)
                places = [slice(*batch.starts[row : row + 2]) for row in range(len(chosen))]
                for sequence, place in zip(chosen, places, strict=True):
                    after = sequence.prompt[sequence.computed + 1 :][: place.stop - place.start]
                    targets[place.start : place.start + len(after)] = after
                logprobs, self._pages = self._step.score(self._pages, batch, targets)
                for sequence, place in zip(chosen, places, strict=True):
                    parts[sequence.request].append((logprobs, place))
                    sequence.computed += place.stop - place.start
                    if sequence.computed == len(sequence.prompt):
                        active.remove(sequence)
                        self._allocator.release(sequence.pages)
                        pieces = [np.asarray(array)[where] for array, where in parts.pop(sequence.request)]
                        yield sequence.request, np.concatenate(pieces)[:-1].tolist()
        finally:
            for sequence in active:  # if the caller stops early
                self._allocator.release(sequence.pages)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Check a request without queueing it; raises as `submit`."""
        self.check_tokens(prompt)
        params.check_vocabulary(self.valid_vocab)
        context = self.config.max_position_embeddings
        if len(prompt) >= context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; with at least one new token it exceeds the model's context "
                f"of {context}"
            )
        most = min(params.max_new_tokens, context - len(prompt))
        if len(prompt) + most > self.cache_tokens:
            raise UserError(
                f"prompt ({len(prompt)} tokens) and max_new_tokens ({most}) need more than the KV cache's "
                f"{self.cache_tokens} tokens; lower max_new_tokens or raise --cache_tokens"
            )

    def check_length(self, tokens: Sequence[int]) -> None:
        """Check a text to be scored; raises as `score`."""
        self.check_tokens(tokens)
        most = min(self.config.max_position_embeddings, self.cache_tokens)
        if len(tokens) > most:
            raise UserError(f"the text has {len(tokens)} tokens; context and KV cache allow {most}")

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Check that token ids can be fed to the model.

        Raises:
          UserError: if there are none or one is outside the vocabulary.
        """
        if not tokens:
            raise UserError("the prompt is empty; give it at least one token")
        if bad := [t for t in tokens if not 0 <= t < self.config.vocab_size]:
            raise UserError(f"token id {bad[0]} is outside the vocabulary of {self.config.vocab_size}")

    def _reserve(self, sequence: _Sequence, tokens: int) -> bool:
        pages = self._allocator.allocate(-(-tokens // self.options.page_size))
        sequence.pages = pages or []
        return pages is not None

    def _admit(self) -> list[TokenEvent]:
        """Give waiting sequences slots, and pages for all they may generate, while both last."""
        new: list[_Sequence] = []
        events: list[TokenEvent] = []
        while self._waiting and self._free_slots:
            if not self._reserve(self._waiting[0], len(self._waiting[0].prompt) + self._waiting[0].most):
                break
            new.append(self._waiting.popleft())
            new[-1].slot = self._free_slots.pop()
        if not new:
            return events
        self._running += new
        needed = Features.of(sequence.params for sequence in self._running)
        if self._sampler is None or not self._features.covers(needed):
            # Other sampler arrays are needed: read the tokens in flight, then lay out every row anew.
            while self._in_flight:
                events += self._collect()
            self._features = needed
            idle = [_Sequence(-1, (), SamplingParams(), slot=slot) for slot in range(self.options.max_sequences)]
            self._sampler = jax.device_put(self._sampler_rows(idle))
            new = self._running
        slots = np.array([sequence.slot for sequence in new], np.int32)
        self._sampler = set_rows(self._sampler, slots, self._sampler_rows(new))
        return events

    def _sampler_rows(self, sequences: list[_Sequence]) -> SamplerState:
        return build_rows(
            [s.params for s in sequences],
            [s.seed for s in sequences],
            [s.prompt for s in sequences],
            [s.output for s in sequences],
            features=self._features,
            vocab_size=self.config.vocab_size,
        )

    def _dispatch(self) -> bool:
        """Dispatch a prefill step if any prompt is unfinished, else a decode step; False if there is nothing to do."""
        if prefilling := [s for s in self._running if s.computed < len(s.prompt)]:
            chosen, batch = self._prefill_batch(prefilling)
        elif chosen := [s for s in self._running if s.sampled < s.most]:
            rows = bucket(len(chosen), self.options.max_sequences)
            batch = self._build([Run((-1,), s.computed, s.pages) for s in chosen], rows, rows)
        else:
            return False
        new = np.diff(batch.starts)
        # A slot out of range: nothing is sampled in that row.
        rows = np.full((2, len(new)), self.options.max_sequences, np.int32)
        sampling = []
        for row, sequence in enumerate(chosen):
            sequence.computed += int(new[row])
            if sequence.computed >= len(sequence.prompt):
                rows[:, row] = sequence.slot, sequence.sampled
                sequence.sampled += 1
                sampling.append((row, sequence))
        logits, self._pages = self._step.forward(self._pages, self._last_tokens, batch, rows[0])
        if sampling:
            out, self._sampler, self._last_tokens = sample_rows(
                logits, self._sampler, self._last_tokens, rows, features=self._features, valid_vocab=self.valid_vocab
            )
            jax.tree.map(lambda array: array.copy_to_host_async(), out)
            self._in_flight.append(_InFlight(sampling, out))
        return True

    def _prefill_batch(self, sequences: list[_Sequence]) -> tuple[list[_Sequence], RaggedBatch]:
        """Choose prompt chunks for a step; returns the sequences that take part and their batch."""
        chunks = take_chunks(
            [len(s.prompt) - s.computed for s in sequences], self.options.prefill_chunk, _PREFILL_ROWS
        )
        chosen = sequences[: len(chunks)]
        runs = [
            Run(s.prompt[s.computed : s.computed + chunk], s.computed, s.pages)
            for s, chunk in zip(chosen, chunks, strict=True)
        ]
        tokens = bucket(sum(chunks), self.options.prefill_chunk, least=16)
        return chosen, self._build(runs, tokens, 1 if len(runs) == 1 else _PREFILL_ROWS)

    def _build(self, runs: list[Run], tokens: int, rows: int) -> RaggedBatch:
        return build_batch(
            runs,
            tokens=tokens,
            rows=rows,
            page_size=self.options.page_size,
            max_pages=self._max_pages,
            scratch_page=self.num_pages - 1,
        )

    def _collect(self) -> list[TokenEvent]:
        """Wait for the oldest step in flight and hand out its tokens."""
        step = self._in_flight.popleft()
        out = jax.tree.map(np.asarray, step.out)
        events = []
        for row, sequence in step.sequences:
            if sequence.finished:
                continue
            token = int(out.tokens[row])
            sequence.output.append(token)
            reason: FinishReason | None = None
            if token in sequence.stop_ids:
                reason = "stop"
            elif len(sequence.output) == sequence.most:
                reason = "length"
            params = sequence.params
            logprob = float(out.logprob[row]) if params.logprobs else None
            top = ()
            if params.top_logprobs:
                pairs = zip(out.top_ids[row].tolist(), out.top_logprobs[row].tolist(), strict=True)
                top = tuple(pairs)[: params.top_logprobs]
            if reason:
                self._finish(sequence)
            events.append(TokenEvent(sequence.request, token, logprob, top, reason))
        return events

    def _finish(self, sequence: _Sequence) -> None:
        """Free what a sequence holds. Steps in flight that still write there come before any that reuse it."""
        sequence.finished = True
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._allocator.release(sequence.pages)
