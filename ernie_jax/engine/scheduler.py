"""Which sequence computes what in the next step, and on which pages: decisions on the host, without JAX.

A step holds one token of every decoding sequence and, beside them, chunks of prompts. Sequences come in order of
priority and then of submission: the first waiting one is admitted before any behind it, prompts are computed in that
order, and when pages run out the last one running gives up its own and computes them again later.

Decisions follow from the calls alone: no clock, no random numbers, no order of a hash. Several processes that make the
same calls plan the same steps.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from ernie_jax.engine.pages import PagePool, extend_keys

PREFILL_ROWS = 8  # chunks of a step in a data group
_AHEAD_TOKENS = 512  # cache that decoding sequences get ahead of need, so that page tables change rarely
_MOST_UNEVEN = 4  # sequences by which a data group may exceed another for the sake of a cached prefix


@dataclasses.dataclass(eq=False)
class Task:
    """A sequence on its way. `computed` and `sampled` count what was dispatched, `output` what was read back.

    Attributes:
      request: its number; of equal priorities the lower comes first.
      most: new tokens, by the request or by the context length; 0 only computes the prompt.
      priority: lower numbers come sooner.
      target: known tokens to compute before the next is sampled: the prompt, and after preemption the output so far.
      slot: where the device keeps its last token and sampler state; -1 while it waits.
      keys: of its full pages, as far as needed.
      registered: how many of its leading pages are known to the pool.
      cached: prompt tokens that were found in the cache when it was first admitted; None before.
    """

    request: int
    prompt: Sequence[int]
    most: int
    priority: int = 0
    target: int = 0
    computed: int = 0
    sampled: int = 0
    output: list[int] = dataclasses.field(default_factory=list)
    slot: int = -1
    group: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    registered: int = 0
    cached: int | None = None
    finished: bool = False

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.request

    @property
    def known(self) -> int:
        """How many tokens the host knows."""
        return len(self.prompt) + len(self.output)

    @property
    def decodes(self) -> bool:
        """Tell whether a step can take one more token of it."""
        return self.computed >= self.target and self.sampled < self.most

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Return known tokens, int32."""
        split = len(self.prompt)
        if end <= split:
            return self._prompt[start:end]
        output = np.array(self.output[max(0, start - split) : end - split], np.int32)
        return np.concatenate([self._prompt[start:], output])

    @functools.cached_property
    def _prompt(self) -> np.ndarray:
        return np.array(self.prompt, np.int32)


@dataclasses.dataclass(frozen=True)
class Part:
    """New tokens of one sequence in a step: `count` from position `start` on.

    Attributes:
      decodes: the one token is the last sampled, which only the device may know.
      samples: the token after these is sampled.
      index: which of the sequence's own tokens that is, 0 for the first.
    """

    task: Task
    start: int
    count: int
    decodes: bool
    samples: bool
    index: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step: the decoding sequences by data group, the chunks by data group, and who got a slot for it."""

    decode: list[Part]
    chunks: list[Part]
    admitted: list[Task]

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)


@dataclasses.dataclass
class Counters:
    """Totals since the start; tokens that are computed again after a preemption do not count."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0


class Scheduler:
    """Plan steps over the page pools of the data groups.

    Attributes:
      waiting: in order.
      running: those with a slot, in the order of admission.
      changes: grows whenever the pages of a running sequence change.
    """

    def __init__(
        self,
        pools: Sequence[PagePool],
        page_size: int,
        *,
        slots: int,
        prefill_chunk: int,
        mixed_chunk: int,
        alignment: int,
        prefix_caching: bool,
    ):
        """Start without sequences.

        Args:
          slots: sequences that run at the same time.
          prefill_chunk, mixed_chunk: most prompt tokens of a step, alone and beside decoding sequences.
          alignment: chunks begin at multiples of so many tokens of a step.
        """
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self.counters = Counters()
        self.changes = 0
        self._pools = pools
        self._page_size = page_size
        self._free_slots = list(range(slots - 1, -1, -1))
        self._prefill_chunk = prefill_chunk
        self._mixed_chunk = mixed_chunk
        self._alignment = alignment
        self._prefix_caching = prefix_caching

    def add(self, task: Task) -> None:
        """Let a task wait for its turn; its prompt and `most` must fit the pages of a group."""
        bisect.insort(self.waiting, task, key=lambda task: task.order)

    def plan(self) -> Plan:
        """Decide the next step, and count it as dispatched."""
        ran_out = self._grow()
        admitted = [] if ran_out else self._admit()
        decoding = sorted((t for t in self.running if t.decodes), key=lambda task: task.group)
        budget = self._mixed_chunk if decoding else self._prefill_chunk
        chunks = [self._advance(task, count) for task, count in self._choose_chunks(budget)]
        plan = Plan([self._advance(task, 1, decodes=True) for task in decoding], chunks, admitted)
        self.counters.steps += bool(plan)
        return plan

    def read(self, task: Task, token: int) -> None:
        """Take down a token that was sampled."""
        task.output.append(token)
        self.counters.generated_tokens += 1
        self._register(task)

    def drop(self, task: Task) -> None:
        """End a task, wherever it is. Steps in flight that still write to its pages come before any that reuse them.

        Into a page of known content such a step writes nothing but that content.
        """
        task.finished = True
        if task.slot < 0:
            self.waiting.remove(task)
        else:
            self._stop(task)

    def _stop(self, task: Task) -> None:
        """Take a running task's slot and pages."""
        self.running.remove(task)
        self._free_slots.append(task.slot)
        pool = self._pools[task.group]
        pool.release(task.pages)
        pool.sequences -= 1
        task.slot, task.group, task.pages = -1, -1, []

    def _preempt(self, task: Task) -> None:
        """Let a running task wait again, to go on from its known tokens; those in flight are still read."""
        self._stop(task)
        task.computed = task.target = task.registered = 0
        self.add(task)
        self.counters.preemptions += 1

    def _advance(self, task: Task, count: int, decodes: bool = False) -> Part:
        start = task.computed
        task.computed += count
        samples = task.computed >= task.target and task.most > 0
        part = Part(task, start, count, decodes, samples, task.sampled)
        task.sampled += samples
        self._register(task)
        return part

    def _choose_chunks(self, budget: int) -> list[tuple[Task, int]]:
        """Choose chunks of unfinished prompts, by data group and in order; `budget` tokens in all."""
        unfinished = sorted((t for t in self.running if t.computed < t.target), key=lambda task: task.order)
        groups = sorted({task.group for task in unfinished})[:budget]
        chosen = []
        for group in groups:
            mine = [task for task in unfinished if task.group == group]
            waiting = [task.target - task.computed for task in mine]
            counts = take_chunks(waiting, budget // len(groups), PREFILL_ROWS, self._alignment)
            chosen += zip(mine, counts, strict=False)
        return chosen

    # Pages ----------------------------------------------------------------------------------------------------------

    def _limit(self, task: Task) -> int:
        """Return how many pages a task can ever need."""
        return -(-(len(task.prompt) + task.most) // self._page_size)

    def _register(self, task: Task) -> None:
        """Make pages known that are full of known tokens, once the step that fills them is planned."""
        if not self._prefix_caching or task.slot < 0:
            return
        full = min(task.computed, task.known) // self._page_size
        if full > task.registered:
            self._extend_keys(task)
            for index in range(task.registered, full):
                self._pools[task.group].register(task.pages[index], task.keys[index])
            task.registered = full

    def _extend_keys(self, task: Task) -> None:
        first = len(task.keys) * self._page_size
        if task.known - first >= self._page_size:
            extend_keys(task.keys, task.tokens(first, task.known), self._page_size)

    def _admit(self) -> list[Task]:
        """Give slots and the pages of their known tokens to waiting tasks, in order, while both last."""
        admitted = []
        while self.waiting and self._free_slots:
            task = self.waiting[0]
            if task.sampled > len(task.output) or not self._place(task):
                break  # it was preempted and a token of it is in flight, or there is no room
            self.waiting.pop(0)
            task.slot = self._free_slots.pop()
            task.target = task.known
            self.running.append(task)
            admitted.append(task)
        return admitted

    def _place(self, task: Task) -> bool:
        """Choose a data group with room, give the task pages there and let it start behind what is cached."""
        keys: list[bytes] = []
        if self._prefix_caching:
            self._extend_keys(task)
            keys = task.keys[: (task.known - 1) // self._page_size]  # a token at least is computed, for its logits
        found = [pool.find(keys) for pool in self._pools]
        fewest = min(pool.sequences for pool in self._pools)

        def preference(group: int) -> tuple:
            pool = self._pools[group]
            hit = len(found[group]) if pool.sequences <= fewest + _MOST_UNEVEN else 0
            return -hit, pool.sequences, -pool.available, group

        wanted = min(self._limit(task), task.known // self._page_size + 1)  # also for the token after
        for group in sorted(range(len(self._pools)), key=preference):
            pool, shared = self._pools[group], found[group]
            need = wanted - len(shared)
            if not self._has_room(group, need + pool.count_idle(shared)):
                continue
            pool.share(shared)
            pool.sequences += 1
            task.group, task.pages = group, shared + pool.take(need)
            task.computed, task.registered = len(shared) * self._page_size, len(shared)
            if task.cached is None:
                task.cached = task.computed
                self.counters.prompt_tokens += len(task.prompt)
                self.counters.cached_tokens += task.cached
            return True
        return False

    def _needed(self, task: Task) -> int:
        """Return how many pages a task fills with its known tokens and the next: no step in flight writes beyond."""
        return max(task.computed // self._page_size + 1, -(-task.target // self._page_size))

    def _has_room(self, group: int, pages: int) -> bool:
        """Tell whether a group has pages for a new task, and one for every task there that may need more."""
        pool = self._pools[group]
        members = [task for task in self.running if task.group == group]
        if pool.available >= pages + sum(len(task.pages) < self._limit(task) for task in members):
            return True
        ahead = sum(max(0, len(task.pages) - self._needed(task)) for task in members)
        if pool.available + ahead < pages + sum(self._needed(task) < self._limit(task) for task in members):
            return False
        self._trim(members)
        return True

    def _grow(self) -> bool:
        """Give decoding tasks the pages of their next tokens; returns whether others were preempted for it."""
        preempted = False
        for group, pool in enumerate(self._pools):
            members = sorted((t for t in self.running if t.group == group), key=lambda task: task.order)
            decoding = [task for task in members if task.decodes]
            if all(len(task.pages) > task.computed // self._page_size for task in decoding):
                continue
            self.changes += 1
            # Everyone gets the same pages ahead, so that nobody's table changes while they last; known ones are spared.
            spare = max(len(pool.free), pool.available // 4)
            ahead = min(max(1, _AHEAD_TOKENS // self._page_size), spare // len(decoding))
            for task in decoding:
                wanted = min(self._limit(task), task.computed // self._page_size + 1 + ahead)
                task.pages += pool.take(max(0, min(wanted - len(task.pages), pool.available)))
            for task in decoding:
                if task.slot < 0 or len(task.pages) > task.computed // self._page_size:
                    continue
                if not pool.available:
                    self._trim(members)
                while not pool.available and task.slot >= 0:
                    self._preempt(members.pop())
                    preempted = True
                if task.slot >= 0:
                    task.pages += pool.take(1)
        return preempted

    def _trim(self, tasks: Iterable[Task]) -> None:
        """Take back pages that tasks got ahead of need."""
        for task in tasks:
            if len(task.pages) > (needed := self._needed(task)):
                self._pools[task.group].release(task.pages[needed:])
                del task.pages[needed:]
                self.changes += 1


def take_chunks(waiting: Sequence[int], budget: int, rows: int, alignment: int) -> list[int]:
    """Say how many tokens of each waiting run go into the next step, in order: at most `budget` tokens, `rows` runs.

    Each run begins at a multiple of `alignment` tokens; what is left free before it counts.
    The reference attention pads all runs of a step to the longest, so a run joins only while that stays within twice
    the budget.
    """
    chunks: list[int] = []
    left = budget
    for length in waiting[:rows]:
        chunk = min(length, left)
        if chunk == 0 or (chunks and (len(chunks) + 1) * max(*chunks, chunk) > 2 * budget):
            break
        chunks.append(chunk)
        left = max(0, left - -(-chunk // alignment) * alignment)
    return chunks
