"""Engine: sequences in, tokens out, with the device always at least one step ahead of the host.

The host decides a step from what it knows without waiting (lengths, pages, budgets), dispatches it, and reads the
tokens of an earlier one. A sequence that turns out to have stopped has by then a surplus token or two in flight, which
are dropped.
"""

from __future__ import annotations

import dataclasses
import random
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np

from ernie_jax import distributed
from ernie_jax.engine import cache
from ernie_jax.engine.batching import NO_SLOT, Run, Step, StepShape, bucket, build_step, take_chunks
from ernie_jax.engine.sampling import Features, SampleOutput, SamplerState, SamplingParams, build_rows
from ernie_jax.engine.step import DeviceStep
from ernie_jax.errors import UserError
from ernie_jax.model import Ernie
from ernie_jax.ops import (
    ATTENTION_BACKENDS,
    EXCHANGE_BACKENDS,
    EXPERT_BACKENDS,
    HALVES,
    LINEAR_BACKENDS,
    ROUTER_BACKENDS,
)
from ernie_jax.sharding import PRESETS, Layout

FinishReason = Literal["stop", "length"]

# Kernels for one kind of chip; the other backends run everywhere.
_PLATFORMS = {"rpa": ("tpu",), "gmm": ("tpu",), "ragged": ("tpu", "gpu"), "cuda": ("gpu",), "mosaic": ("gpu",)}
_STEPS_AHEAD = 2
_PREFILL_ROWS = 8  # of a data group


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Size an Engine.

    Attributes:
      cache_tokens: tokens that the KV cache holds over all sequences; None takes what fits in the device's memory.
      max_sequences: sequences decoded at the same time.
      prefill_chunk: most prompt tokens of a step; None takes 8192 on a GPU, else 512.
      page_size: tokens of a cache page.
      expert_backend: a name of ops.EXPERT_BACKENDS; None chooses by platform and number of tokens.
      attention_backend: a name of ops.ATTENTION_BACKENDS; None chooses by platform.
      exchange_backend: a name of ops.EXCHANGE_BACKENDS; None chooses by platform.
      linear_backend: a name of ops.LINEAR_BACKENDS; None chooses by platform and shape.
      router_backend: a name of ops.ROUTER_BACKENDS; None chooses by platform and shape.
      halves_backend: a name of ops.HALVES; None chooses by platform, unless a backend of a part is asked for.
    """

    cache_tokens: int | None = None
    max_sequences: int = 64
    prefill_chunk: int | None = None
    page_size: int = cache.PAGE_SIZE
    expert_backend: str | None = None
    attention_backend: str | None = None
    exchange_backend: str | None = None
    linear_backend: str | None = None
    router_backend: str | None = None
    halves_backend: str | None = None

    def __post_init__(self):
        for name in ("cache_tokens", "max_sequences", "prefill_chunk", "page_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        known = {
            "expert": EXPERT_BACKENDS,
            "attention": ATTENTION_BACKENDS,
            "exchange": EXCHANGE_BACKENDS,
            "linear": LINEAR_BACKENDS,
            "router": ROUTER_BACKENDS,
            "halves": HALVES,
        }
        for op, backends in known.items():
            backend = getattr(self, f"{op}_backend")
            if backend not in (None, *backends):
                raise UserError(f"ops: no {op} backend {backend!r}; choose one of {', '.join(backends)}")


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
    group: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    sampled: int = 0
    output: list[int] = dataclasses.field(default_factory=list)
    finished: bool = False


@dataclasses.dataclass(frozen=True)
class _InFlight:
    sequences: list[tuple[int, _Sequence]]  # (row, sequence) of the rows that sampled
    out: SampleOutput


def default_prefill_chunk(platform: str) -> int:
    """Return how many prompt tokens a step takes at most."""
    # On a GPU, long chunks keep the grouped products busy: 591 TFLOP/s at 8,192 tokens, 407 at 2,048 (H200).
    # On a TPU, XLA's scatter of 2,048 tokens changes the layout of the whole cache; that of 512 does not.
    return 8192 if platform == "gpu" else 512


class Engine:
    """Generate for many requests at once over one paged cache.

    Raises:
      UserError: if the options do not suit the model or the device.
    """

    def __init__(
        self,
        model: Ernie,
        layout: Layout,
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
        if not PRESETS[layout.preset].serves:
            raise UserError(f"--sharding={layout.preset} is for training; choose another to generate")
        options = options or EngineOptions()
        ops = ("expert", "attention", "exchange", "linear", "router", "halves")
        backends = {f"{op}_backend": getattr(options, f"{op}_backend") for op in ops}
        for backend in backends.values():
            if backend in _PLATFORMS and layout.platform not in _PLATFORMS[backend]:
                raise UserError(f"ops: backend {backend} does not run on a {layout.platform}; leave it out")
        if options.prefill_chunk is None:
            options = dataclasses.replace(options, prefill_chunk=default_prefill_chunk(layout.platform))
        self.options = options
        self.dtype = model.embed.weight.dtype
        self.valid_vocab = valid_vocab or self.config.vocab_size
        self.stop_ids = stop_ids
        self._groups = layout.groups
        if options.cache_tokens is None:
            most = options.max_sequences * self.config.max_position_embeddings
            tokens = min(distributed.gather(cache.default_group_tokens(self.config, self.dtype, layout, most)))
        else:
            tokens = -(-options.cache_tokens // self._groups)
        self._group_pages = -(-tokens // options.page_size) + 1  # the last is scratch, for padding
        self._max_pages = -(-self.config.max_position_embeddings // options.page_size)
        self._pages = cache.make_pages(self.config, self.dtype, self._group_pages, options.page_size, layout)
        self._pools = cache.PagePools(self._groups, self._group_pages - 1)
        self._step = DeviceStep(model, layout, **backends)
        self._last_tokens = layout.put(np.zeros(options.max_sequences, np.int32))
        self._put = layout.put
        self._seeds = random.Random(distributed.broadcast(secrets.randbits(63)))
        self._features = Features()
        self._sampler: SamplerState | None = None
        self._free_slots = list(range(options.max_sequences - 1, -1, -1))
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._in_flight: deque[_InFlight] = deque()
        # The last step if it was one of decoding: its sequences and shape, and on the devices the step that follows.
        self._following: tuple[list[_Sequence], StepShape, jax.Array] | None = None
        self._requests = 0

    @property
    def group_tokens(self) -> int:
        """How many tokens the cache of a data group holds: the most that one sequence can have."""
        return (self._group_pages - 1) * self.options.page_size

    @property
    def cache_tokens(self) -> int:
        """How many tokens the cache holds over all sequences."""
        return self._groups * self.group_tokens

    @property
    def free_tokens(self) -> int:
        """How many tokens of the cache no sequence has reserved."""
        return self._pools.num_free * self.options.page_size

    def describe_ops(self) -> str:
        """Name the backend of every op, and where it was not asked for what decides."""
        step = self._step
        words = [f"attention: {step.attention_backend}"]
        if self.config.is_moe:
            words.append(f"experts: {step.backends.experts or 'by tokens'}")
            words.append(f"router: {step.backends.router or 'by tokens'}")
        words.append(f"linear: {step.backends.linear or 'by tokens'}")
        if step.backends.takes_halves:
            words.append("halves of layers: cuda for few tokens")
        if step.exchanges:
            words.append(f"exchange: {step.backends.exchange}")
        return " · ".join(words)

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
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
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

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits [T, V] float32 after each token of a sequence, computed without the cache.

        Raises:
          UserError: if there are none or one is outside the vocabulary.
        """
        self.check_tokens(tokens)
        padded = np.zeros(-(-len(tokens) // 128) * 128, np.int32)  # few compiled lengths
        padded[: len(tokens)] = tokens
        return np.asarray(self._step.logits(padded)[: len(tokens)], np.float32)

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
                while (
                    waiting
                    and len(active) < self._groups * _PREFILL_ROWS
                    and self._reserve(waiting[0], len(waiting[0].prompt))
                ):
                    active.append(waiting.popleft())
                chosen, step = self._prefill_step(active)
                targets = np.zeros(len(step.tokens), np.int32)
                places = [slice(*step.starts[row : row + 2]) for row in range(len(chosen))]
                for sequence, place in zip(chosen, places, strict=True):
                    after = sequence.prompt[sequence.computed + 1 :][: place.stop - place.start]
                    targets[place.start : place.start + len(after)] = after
                logprobs, self._pages = self._step.score(self._pages, step, targets)
                for sequence, place in zip(chosen, places, strict=True):
                    parts[sequence.request].append((logprobs, place))
                    sequence.computed += place.stop - place.start
                    if sequence.computed == len(sequence.prompt):
                        active.remove(sequence)
                        self._pools.release(sequence.group, sequence.pages)
                        pieces = [np.asarray(array)[where] for array, where in parts.pop(sequence.request)]
                        yield sequence.request, np.concatenate(pieces)[:-1].tolist()
        finally:
            for sequence in active:  # if the caller stops early
                self._pools.release(sequence.group, sequence.pages)

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
        if len(prompt) + most > self.group_tokens:
            groups = f" in each of {self._groups} data groups" if self._groups > 1 else ""
            raise UserError(
                f"prompt ({len(prompt)} tokens) and max_new_tokens ({most}) need more than the KV cache's "
                f"{self.group_tokens} tokens{groups}; lower max_new_tokens or raise --cache_tokens"
            )

    def check_length(self, tokens: Sequence[int]) -> None:
        """Check a text to be scored; raises as `score`."""
        self.check_tokens(tokens)
        most = min(self.config.max_position_embeddings, self.group_tokens)
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
        place = self._pools.allocate(-(-tokens // self.options.page_size))
        if place is not None:
            sequence.group, sequence.pages = place
        return place is not None

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
            self._sampler = jax.tree.map(self._put, self._sampler_rows(idle))
            new = self._running
        slots = np.array([sequence.slot for sequence in new], np.int32)
        self._sampler = self._step.set_rows(self._sampler, slots, self._sampler_rows(new))
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
            self._following = None
            chosen, step = self._prefill_step(prefilling)
            shape, packed, counts = step.shape, self._step.place(step), np.diff(step.starts)
        elif chosen := sorted((s for s in self._running if s.sampled < s.most), key=lambda s: s.group):
            shape, packed = self._decode_step(chosen)
            counts = [1] * len(chosen)
        else:
            return False
        sampling = []
        for row, sequence in enumerate(chosen):
            sequence.computed += int(counts[row])
            if sequence.computed >= len(sequence.prompt):
                sequence.sampled += 1
                sampling.append((row, sequence))
        (logits, rows, following), self._pages = self._step.forward(self._pages, self._last_tokens, packed, shape)
        if not prefilling:
            self._following = chosen, shape, following
        if sampling:
            out, self._sampler, self._last_tokens = self._step.sample(
                logits, self._sampler, self._last_tokens, rows, features=self._features, valid_vocab=self.valid_vocab
            )
            out = jax.tree.map(lambda array: array.addressable_data(0), out)
            jax.tree.map(lambda array: array.copy_to_host_async(), out)
            self._in_flight.append(_InFlight(sampling, out))
        return True

    def _decode_step(self, chosen: list[_Sequence]) -> tuple[StepShape, jax.Array]:
        """Return the next decode step, on the devices: from the last one if the sequences are the same.

        Sending a step to several GPUs takes longer than a small one runs, and most follow one of the same sequences.
        """
        if self._following is not None:
            sequences, shape, packed = self._following
            width = shape.pages * self.options.page_size
            if chosen == sequences and all(s.computed < width for s in chosen):
                return shape, packed
        rows = bucket(len(chosen), self.options.max_sequences)
        _, step = self._build(
            [(s, Run((-1 - s.slot,), s.computed, s.pages, s.slot, s.sampled)) for s in chosen], rows, rows
        )
        return step.shape, self._step.place(step)

    def _prefill_step(self, sequences: list[_Sequence]) -> tuple[list[_Sequence], Step]:
        """Choose prompt chunks for a step; returns the sequences that take part, and the step with a row for each."""
        groups = {s.group for s in sequences}
        budget = max(1, self.options.prefill_chunk // len(groups))
        runs = []
        for group in groups:
            waiting = [s for s in sequences if s.group == group]
            chunks = take_chunks([len(s.prompt) - s.computed for s in waiting], budget, _PREFILL_ROWS)
            for sequence, chunk in zip(waiting, chunks, strict=False):
                end = sequence.computed + chunk
                slot = sequence.slot if end == len(sequence.prompt) else NO_SLOT
                run = Run(sequence.prompt[sequence.computed : end], sequence.computed, sequence.pages, slot)
                runs.append((sequence, run))
        tokens = bucket(sum(len(run.tokens) for _, run in runs), self.options.prefill_chunk, least=16)
        return self._build(runs, tokens, 1 if len(runs) == 1 else self._groups * _PREFILL_ROWS)

    def _build(self, runs: list[tuple[_Sequence, Run]], tokens: int, rows: int) -> tuple[list[_Sequence], Step]:
        """Sort runs by data group; returns their sequences in the order of the step's rows, and the step."""
        runs = sorted(runs, key=lambda item: item[0].group)
        step = build_step(
            [[run for s, run in runs if s.group == group] for group in range(self._groups)],
            tokens=tokens,
            rows=rows,
            page_size=self.options.page_size,
            max_pages=self._max_pages,
            scratch_page=self._group_pages - 1,
        )
        return [sequence for sequence, _ in runs], step

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
        self._pools.release(sequence.group, sequence.pages)
