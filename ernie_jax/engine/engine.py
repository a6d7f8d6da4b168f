"""Engine: sequences in, tokens out, with the device always at least one step ahead of the host.

The host decides a step from what it knows without waiting (lengths, pages, budgets), dispatches it, and reads the
tokens of an earlier one. A sequence that turns out to have stopped has by then some surplus tokens in flight, which are
dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import random
import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ernie_jax import distributed
from ernie_jax.channel import Receiver, Sender
from ernie_jax.engine import cache, together
from ernie_jax.engine.batching import NO_SLOT, Run, Step, StepShape, build_step, pack
from ernie_jax.engine.devices import Devices
from ernie_jax.engine.events import FinishReason, Grammar, Progress, Stats, TokenEvent
from ernie_jax.engine.options import EngineOptions
from ernie_jax.engine.pages import PagePool
from ernie_jax.engine.sampler import Sampler, Settings, Stages
from ernie_jax.engine.sampling import SampleOutput, SamplingParams
from ernie_jax.engine.scheduler import PREFILL_ROWS, Part, Plan, Scheduler, Task
from ernie_jax.engine.shapes import Shapes
from ernie_jax.engine.step import DeviceStep
from ernie_jax.engine.warm_up import compile_all
from ernie_jax.errors import UserError
from ernie_jax.model import Ernie
from ernie_jax.sharding import PRESETS, Layout

# Steps that are dispatched before the first of them is waited for: more where they are short, as the host pauses at
# times for longer than one of these takes.
_STEPS_AHEAD, _STEPS_AHEAD_OF_FEW = 2, 4
_FEW = 4  # sequences


@dataclasses.dataclass(eq=False, kw_only=True)
class _Sequence(Task):
    """A request on its way, and how it is sampled."""

    params: SamplingParams
    stop_ids: frozenset[int]
    seed: int
    stages: Stages
    grammar: Grammar | None
    include_routing: bool
    problem: str | None = None

    @property
    def settings(self) -> Settings:
        return Settings(self.slot, self.params, self.seed, self.prompt, self.output)


class _InFlight(NamedTuple):
    sequences: list[tuple[int, _Sequence]]  # (row, sequence) of the rows that sampled
    out: SampleOutput
    experts: jax.Array | None
    load: jax.Array | tuple[()]


class _Load(NamedTuple):
    """Counts of experts: those before the last reset, and the device's since, as of a step that is known to be done."""

    before: np.ndarray | int
    since: jax.Array | tuple[()]


class _Following(NamedTuple):
    """The step after a decode step of the same sequences over the same pages, on the devices already."""

    tasks: list[Task]
    changes: int
    shape: StepShape


class Engine:
    """Generate for many requests at once over one paged cache.

    Requests join and leave between steps. It knows no clock: whoever sets a deadline calls `cancel` when it has passed.
    Where several processes run the same engine either all of them make the same calls between the same steps, or one
    leads and the others follow.

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
        self.options = options = (options or EngineOptions()).on(layout.platform)
        self.dtype = model.embed.dtype
        self.kv_dtype = cache.parse_kv_dtype(options.kv_dtype, self.dtype)
        self.valid_vocab = valid_vocab or self.config.vocab_size
        self.stop_ids = stop_ids
        self._groups = layout.groups
        if options.cache_tokens is None:
            most = options.max_sequences * self.config.max_position_embeddings
            tokens = min(distributed.gather(cache.default_group_tokens(self.config, self.kv_dtype, layout, most)))
        else:
            tokens = -(-options.cache_tokens // self._groups)
        self._group_pages = -(-tokens // options.page_size) + 1  # the last is scratch, for padding
        sizes = self.config, self.kv_dtype, self._group_pages, options.page_size
        self._pools = [PagePool(self._group_pages - 1) for _ in range(self._groups)]
        self._step = DeviceStep(model, layout, **options.backends, kv_dtype=self.kv_dtype)
        self._shapes = Shapes(
            self._groups,
            options.max_sequences,
            options.prefill_chunk,
            options.mixed_chunk,
            options.page_size,
            max_pages=-(-self.config.max_position_embeddings // options.page_size),
            **self._step.needs(options.page_size)._asdict(),
        )
        self._scheduler = self._make_scheduler(options.max_sequences, options.prefix_caching)
        sampler = Sampler(self._step, options.max_sequences, layout.put, self.config.vocab_size, self.valid_vocab)
        self._devices = Devices(self._step, sampler, functools.partial(cache.make_pages, *sizes, layout))
        self._between_gaps = cache.leave_gaps(layout)  # only to live as long as this
        self._seeds = random.Random(distributed.broadcast(secrets.randbits(63)))
        self._sequences: dict[int, _Sequence] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._following: _Following | None = None
        self._requests = 0
        self._load = _Load(0, self._devices.load)

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
        """How many tokens of the cache no sequence uses."""
        return sum(pool.available for pool in self._pools) * self.options.page_size

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._in_flight)

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
        if self.config.forms:
            words.append(f"{self.config.forms} weights")
        return " · ".join(words)

    def stats(self) -> Stats:
        """Count what the engine holds and has done."""
        pages = self._groups * (self._group_pages - 1)
        cached, free = (sum(counts) for counts in zip(*((p.idle, len(p.free)) for p in self._pools), strict=True))
        return Stats(
            len(self._scheduler.running),
            len(self._scheduler.waiting),
            free,
            cached,
            pages - free - cached,
            **dataclasses.asdict(self._scheduler.counters),
        )

    def expert_load(self) -> np.ndarray | None:
        """Return how many tokens have chosen each expert of each layer with experts, [L, E] int64; None if it has none.

        Every token counts that the model computed, of prompts, answers and scored texts: not what was found in the
        cache, again what was computed again after a preemption, and also a surplus token after the end of an answer.
        Any thread may ask; no step waits for it. Of several processes each has a part, process 0 all of it unless the
        data groups exchange tokens.
        """
        before, since = self._load
        return before + self._step.read_load(since) if self.config.moe_layers else None

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        grammar: Grammar | None = None,
        include_routing: bool = False,
    ) -> int:
        """Queue a prompt of token ids and return the request's number.

        Args:
          priority: of waiting requests those with the lowest number come first, among equals in order.
          grammar: what the answer must obey; ids that end the sequence are its business too. The engine moves it on.
          include_routing: tell with each token which experts it came from.

        Raises:
          UserError: if the prompt is empty, holds an id outside the vocabulary, or does not fit the context or cache;
            or if the model has no experts to tell of.
        """
        self.check(prompt, params)
        if include_routing and not self.config.moe_layers:
            raise UserError("include_routing needs a model with experts, which this one has not")
        most = min(params.max_new_tokens, self.config.max_position_embeddings - len(prompt))
        request, self._requests = self._requests, self._requests + 1
        sequence = _Sequence(
            request,
            prompt,
            most,
            priority,
            params=params,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids),
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
            stages=Stages.of(params),
            grammar=grammar,
            include_routing=include_routing,
        )
        self._sequences[request] = sequence
        self._scheduler.add(sequence)
        return request

    def cancel(self, request: int) -> None:
        """Drop a request; its pages are free at once. An unknown or finished one is ignored."""
        if request in self._sequences:
            self._finish(self._sequences[request])

    def reset(self) -> list[int]:
        """Start over after a step has failed: drop all requests, whose numbers are returned, and what is cached."""
        dropped = list(self._sequences)
        for request in dropped:
            self.cancel(request)
        for pool in self._pools:
            pool.forget()  # perhaps the failed step was to fill them
        self._in_flight.clear()
        self._following = None
        load = self.expert_load()  # without the failed step
        self._devices.reset()
        if load is not None:
            self._load = _Load(load, self._devices.load)
        return dropped

    def freeze(self) -> None:
        """Keep Python from stopping all sequences to look for garbage among compiled programs; see `Devices.freeze`."""
        self._devices.freeze()

    @contextlib.contextmanager
    def lead(self, sender: Sender) -> Iterator[None]:
        """Have the same engine in other processes, which call `follow`, do on its devices what this one does.

        It must be idle at the beginning and is not to be used after the end.
        """
        self._devices = together.LeadingDevices(self._devices, sender)
        yield
        self._devices.end()

    def follow(self, receiver: Receiver) -> None:
        """Do what the engine that leads does on the devices, until it ends.

        Raises:
          ConnectionError: if its process goes without a word.
        """
        together.follow(self._devices, receiver)

    def progress(self, request: int) -> Progress | None:
        """Tell how far the prompt of a request is computed, as far as dispatched; None if it has finished."""
        if (sequence := self._sequences.get(request)) is None:
            return None
        length = len(sequence.prompt)
        return Progress(length, min(sequence.computed, length), sequence.cached or 0)

    def step(self) -> list[TokenEvent]:
        """Dispatch the next step if there is one, and return the tokens that have arrived meanwhile."""
        plan = self._scheduler.plan()
        events, dispatched = self._dispatch(plan)
        few = len(plan.decode) <= _FEW and not plan.chunks
        most = _STEPS_AHEAD_OF_FEW if few else _STEPS_AHEAD
        if not dispatched:
            most = max(len(self._in_flight) - 1, 0)
        while len(self._in_flight) > most:
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
        return np.asarray(self._devices.logits(padded)[: len(tokens)], np.float32)

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
        scheduler = self._make_scheduler(self._groups * PREFILL_ROWS, prefix_caching=False)
        for index, prompt in enumerate(prompts):
            scheduler.add(Task(index, prompt, most=0))
        pieces = defaultdict(list)
        try:
            while plan := scheduler.plan():
                parts, step = self._build(plan)
                places = [slice(end + 1 - part.count, end + 1) for part, end in zip(parts, step.last, strict=False)]
                targets = np.zeros(len(step.tokens), np.int32)
                for part, place in zip(parts, places, strict=True):
                    after = part.task.prompt[part.start + 1 :][: part.count]
                    targets[place.start : place.start + len(after)] = after
                logprobs, self._devices.pages = self._step.score(self._devices.pages, step, targets)
                for part, place in zip(parts, places, strict=True):
                    pieces[part.task.request].append((logprobs, place))
                for task in [part.task for part in parts if part.task.computed == part.task.target]:
                    scheduler.drop(task)
                    found = [np.asarray(array)[where] for array, where in pieces.pop(task.request)]
                    self._load = self._load._replace(since=self._devices.load)
                    yield task.request, np.concatenate(found)[:-1].tolist()
        finally:
            for task in list(scheduler.running):  # if the caller stops early
                scheduler.drop(task)

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
        if min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            bad = next(t for t in tokens if not 0 <= t < self.config.vocab_size)
            raise UserError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")

    def shapes(self, context: int | None = None) -> list[StepShape]:
        """Return the shapes of steps, each a program, of sequences of up to `context` tokens; default: the longest."""
        most = min(self.config.max_position_embeddings, self.group_tokens)
        return self._shapes.all(min(context or most, most))

    def warm_up(
        self,
        params: Iterable[SamplingParams] = (),
        context: int | None = None,
        grammars: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Compile ahead what steps need, several programs at a time, and run each with nobody in it.

        The engine must be idle.

        Args:
          params: settings to come; what any of them asks for needs no other program then.
          context: of the longest sequence to come; default: the longest that fits.
          grammars: some requests will have one.
          progress: called with how many programs are compiled, of how many.
        """
        shapes, params = self.shapes(context), list(params)
        devices = self._devices
        devices.lay_out(params)
        kinds = devices.sampler.kinds(params, grammars)
        total = len(shapes) + len({shape.rows for shape in shapes}) * len(kinds)
        done = itertools.count(1)
        progress(0, total)

        def compiled() -> None:
            progress(next(done), total)

        pages = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), devices.pages
        )
        slots = self.options.max_sequences
        kept = compile_all((self._step.lower(shape, pages, slots) for shape in shapes), compiled)
        by_rows = {}
        for shape in shapes:
            out = devices.forward(shape, pack(self._make_step([()] * self._groups, shape)))
            by_rows[shape.rows] = out.logits, out.rows
            if self.config.moe_layers:
                devices.experts()
        del kept
        steps = list(itertools.product(by_rows.values(), kinds))
        kept = compile_all((devices.sampler.lower(*out, kind) for out, kind in steps), compiled)
        for out, kind in steps:
            devices.sampler.warm_up(*out, kind)
        del kept
        devices.sampler.warm_up_settings()
        devices.settle()

    def _make_scheduler(self, slots: int, prefix_caching: bool) -> Scheduler:
        options = self.options
        return Scheduler(
            self._pools,
            options.page_size,
            slots=slots,
            prefill_chunk=options.prefill_chunk,
            mixed_chunk=options.mixed_chunk,
            alignment=self._shapes.alignment,
            prefix_caching=prefix_caching,
        )

    def _set_sampler(self, admitted: list[_Sequence]) -> list[TokenEvent]:
        """Tell the devices how new sequences are sampled; returns tokens that had to be read before."""
        events: list[TokenEvent] = []
        if not admitted:
            return events
        running = self._scheduler.running
        if not self._devices.sampler.covers(sequence.params for sequence in admitted):
            # Other sampler arrays are needed: read the tokens in flight, then lay out every row anew.
            while self._in_flight:
                events += self._collect()
            self._devices.lay_out(sequence.params for sequence in running)
            admitted = running
        self._devices.set([sequence.settings for sequence in admitted])
        return events

    def _dispatch(self, plan: Plan) -> tuple[list[TokenEvent], bool]:
        """Dispatch a step; returns tokens that had to be read before it was sampled, and whether there was one."""
        following, tasks = self._following, [part.task for part in plan.decode]
        self._following = None
        if (
            following
            and not plan.chunks
            and following.tasks == tasks
            and following.changes == self._scheduler.changes
            and all(part.start < following.shape.pages * self.options.page_size for part in plan.decode)
        ):
            # Sending a step to several GPUs takes longer than a small one runs.
            parts, shape, packed = plan.decode, following.shape, None
        else:
            parts, step = self._build(plan)
            if not parts:
                return self._set_sampler(plan.admitted), False
            shape, packed = step.shape, pack(step)
        self._devices.forward(shape, packed)
        if not plan.chunks:
            self._following = _Following(tasks, self._scheduler.changes, shape)
        events = self._set_sampler(plan.admitted)  # while the devices compute
        sampling = [(row, part.task) for row, part in enumerate(parts) if part.samples]
        if sampling:
            mask = None
            if any(sequence.grammar for _, sequence in sampling):
                # What a grammar allows depends on the last token; meanwhile the devices compute.
                while self._in_flight:
                    events += self._collect()
                mask = self._mask(sampling, shape.rows)
            stages = functools.reduce(operator.or_, {sequence.stages for _, sequence in sampling})
            sampled = self._devices.sample(stages, mask)
            experts = None
            if any(sequence.include_routing for _, sequence in sampling):
                experts = self._devices.experts()
                experts.copy_to_host_async()
            self._in_flight.append(_InFlight(sampling, sampled, experts, self._devices.load))
        return events, True

    def _mask(self, sampling: list[tuple[int, _Sequence]], rows: int) -> np.ndarray | None:
        """Ask the grammars what they allow in each row; None if everything. One that cannot go on allows all."""
        mask = None
        for row, sequence in sampling:
            if sequence.grammar is None or sequence.finished or sequence.grammar.free:
                continue
            mask = self._devices.sampler.empty_mask(rows) if mask is None else mask
            try:
                sequence.grammar.mask(mask[row])
            except UserError as error:
                sequence.problem = str(error)
                mask[row] = -1
        return mask

    def _build(self, plan: Plan) -> tuple[list[Part], Step | None]:
        """Lay out a step; returns its parts in the order of its rows, and the step unless it is empty."""
        # A sequence may have turned out to have stopped since the plan.
        live = [[part for part in parts if not part.task.finished] for parts in (plan.decode, plan.chunks)]
        decode, chunks = ([[p for p in parts if p.task.group == g] for g in range(self._groups)] for parts in live)
        groups = [first + rest for first, rest in zip(decode, chunks, strict=True)]
        parts = [part for group in groups for part in group]
        if not parts:
            return [], None
        shape = self._shapes.choose(
            [len(group) for group in decode],
            [[part.count for part in group] for group in chunks],
            max(part.start + part.count for part in parts),
        )
        return parts, self._make_step([[_run(part) for part in group] for group in groups], shape)

    def _make_step(self, runs: Sequence[Sequence[Run]], shape: StepShape) -> Step:
        return build_step(runs, shape, page_size=self.options.page_size, scratch_page=self._group_pages - 1)

    def _collect(self) -> list[TokenEvent]:
        """Wait for the oldest step in flight and hand out its tokens."""
        step = self._in_flight.popleft()
        out, experts = jax.tree.map(np.asarray, (step.out, step.experts))
        self._load = self._load._replace(since=step.load)
        events = []
        for row, sequence in step.sequences:
            if sequence.finished:
                continue
            token = int(out.tokens[row])
            self._scheduler.read(sequence, token)
            reason = self._finish_reason(sequence, token)
            params = sequence.params
            logprob = float(out.logprob[row]) if params.logprobs else None
            top = ()
            if params.top_logprobs:
                pairs = zip(out.top_ids[row].tolist(), out.top_logprobs[row].tolist(), strict=True)
                top = tuple(pairs)[: params.top_logprobs]
            if reason:
                self._finish(sequence)
            chosen = experts[:, row] if sequence.include_routing else None
            event = TokenEvent(sequence.request, token, logprob, top, reason, sequence.cached, chosen, sequence.problem)
            events.append(event)
        return events

    def _finish_reason(self, sequence: _Sequence, token: int) -> FinishReason | None:
        """Say whether a token that was just read ends its sequence, and move its grammar on."""
        ended, grammar = token in sequence.stop_ids, sequence.grammar
        if grammar and not sequence.problem:
            if not grammar.accept(token):
                sequence.problem = "the grammar does not take a token that it allowed"
            ended = ended or grammar.finished
        if sequence.problem:
            return "error"
        if ended:
            return "stop"
        return "length" if len(sequence.output) == sequence.most else None

    def _finish(self, sequence: _Sequence) -> None:
        self._scheduler.drop(sequence)
        del self._sequences[sequence.request]


def _run(part: Part) -> Run:
    task = part.task
    tokens = (-1 - task.slot,) if part.decodes else task.tokens(part.start, part.start + part.count)
    return Run(tokens, part.start, task.pages, task.slot if part.samples else NO_SLOT, part.index)
