"""Measure decode steps and prefill of a model through its Engine.

A decode step is the difference of two runs that differ only in how many tokens they generate, over the difference in
tokens: prefill and the start of the pipeline cancel out, sampling is included.
"""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np

from ernie_jax.bench import drive
from ernie_jax.bench.machine import Machine
from ernie_jax.bench.ops import TracedOps
from ernie_jax.engine import Engine
from ernie_jax.errors import UserError
from ernie_jax.planner.costs import Cost, Load, decode_load, step_cost
from ernie_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Decode:
    """`batch` prompts of `context` tokens each, continued by `short` and by `long` tokens."""

    batch: int
    context: int
    short: int
    long: int
    kind = "decode"

    @property
    def runs(self) -> tuple[int, ...]:
        """New tokens of each run that a measurement takes."""
        return self.short, self.long

    def seconds(self, short: float, long: float) -> float:
        """Return a step's time from that of the runs."""
        return (long - short) / (self.long - self.short)

    @property
    def mean_context(self) -> int:
        """The mean context of the steps that make the difference."""
        return self.context + (self.short + self.long) // 2

    def cost(self, engine: Engine, layout: Layout) -> Cost:
        """Count what a step cannot avoid."""
        load = decode_load(layout, self.batch, self.mean_context)
        return step_cost(engine.config, engine.dtype, layout, load, engine.kv_dtype)

    def step_tokens(self, engine: Engine) -> int:
        return drive.decode_tokens(engine, self.batch)

    def tokens_of(self, seconds: float) -> float:
        return self.batch / seconds


@dataclasses.dataclass(frozen=True)
class Prefill:
    """`batch` prompts of `context` tokens each, from submit to the last one's first token."""

    batch: int
    context: int
    kind = "prefill"
    runs = (1,)

    def seconds(self, whole: float) -> float:
        """Return a prefill's time from that of its run."""
        return whole

    def cost(self, engine: Engine, layout: Layout) -> Cost:
        """Count what one step with all the tokens cannot avoid: more steps, in chunks, are the engine's choice."""
        rows = -(-self.batch // layout.groups)  # of the busiest group
        load = Load(
            tokens=self.batch * self.context,
            group_tokens=rows * self.context,
            rows=self.batch,
            cached=rows * self.context,
            attended=rows * self.context * (self.context + 1) // 2,
        )
        return step_cost(engine.config, engine.dtype, layout, load, engine.kv_dtype)

    def step_tokens(self, engine: Engine) -> int:
        return drive.prefill_tokens(engine, self.batch * self.context)

    def tokens_of(self, seconds: float) -> float:
        return self.batch * self.context / seconds


Case = Decode | Prefill


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of a case.

    Attributes:
      seconds: of a decode step, or of the whole prefill; median.
      runs: those of which it is the median.
      compile_seconds: how much longer the first of each took.
      moved, flops: bytes and operations that the busiest device cannot avoid.
      floor: the least seconds that they take here.
      bound: memory or compute.
      ops: the backend of every op.
      sequences: each sequence's prompt and new tokens, of the last run.
    """

    case: Case
    seconds: float
    runs: list[float]
    compile_seconds: float
    moved: float
    flops: float
    floor: float
    bound: str
    ops: str
    sequences: list[list[int]]

    @property
    def tokens_per_second(self) -> float:
        return self.case.tokens_of(self.seconds)

    @property
    def of_floor(self) -> float:
        return self.floor / self.seconds

    def to_object(self) -> dict:
        """Return what `--json` prints."""
        return {
            "kind": self.case.kind,
            "batch": self.case.batch,
            "context": self.case.context,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "bytes": self.moved,
            "flops": self.flops,
            "floor_seconds": self.floor,
            "of_floor": self.of_floor,
            "bound": self.bound,
            "compile_seconds": self.compile_seconds,
            "runs": self.runs,
            "ops": self.ops,
        }


def measure(
    engine: Engine,
    layout: Layout,
    case: Case,
    machine: Machine,
    traced: TracedOps,
    rng: np.random.Generator,
    repeats: int = 5,
    spread: float = 0.0,
) -> Row:
    """Run a case once to compile it, then `repeats` times, each with fresh prompts over shuffled pages.

    Prompts are as long each time, so that every run takes the same steps and none is compiled while time counts.

    Args:
      traced: of all cases of the engine.
      spread: how much the prompts' lengths differ, as in `drive.draw_lengths`.

    Raises:
      UserError: if the cache or the engine has no room for the case, or the difference of the runs drowns in noise.
    """
    _check_room(engine, layout, case, spread)
    lengths = drive.draw_lengths(rng, case.batch, case.context, spread)

    def once(new: int) -> float:
        nonlocal sequences
        prompts = drive.random_prompts(engine, rng, lengths)
        drive.shuffle_pages(engine, rng)
        seconds, outputs = drive.run(engine, prompts, new)
        sequences = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
        return seconds

    sequences: list[list[int]] = []
    with traced.noting():  # either run may need a program that the other does not
        first = [once(new) for new in case.runs]
    timed = [[once(new) for new in case.runs] for _ in range(repeats)]
    runs = [case.seconds(*each) for each in timed]
    seconds = statistics.median(runs)
    if seconds <= 0:
        raise UserError(
            f"{case.long} new tokens took no longer than {case.short}: the machine is too busy; give more --repeats "
            "or --lengths further apart"
        )
    cost = case.cost(engine, layout)
    moved = cost.weights + cost.cache
    floor, bound = machine.floor(moved, cost.flops)
    compiling = max(0.0, sum(first) - statistics.median(map(sum, timed)))
    ops = traced.describe(case.step_tokens(engine))
    return Row(case, seconds, runs, compiling, moved, cost.flops, floor, bound, ops, sequences)


def _check_room(engine: Engine, layout: Layout, case: Case, spread: float) -> None:
    """Refuse what would run in several rounds: it would be timed as if it were one."""
    if case.batch > engine.options.max_sequences:
        raise UserError(f"{case.batch} sequences at once, and the engine takes {engine.options.max_sequences}")
    each = drive.needed_tokens(engine, round(case.context * (1 + spread)), max(case.runs))
    rows = -(-case.batch // layout.groups)
    if rows * each > engine.group_tokens:
        raise UserError(
            f"needs {case.batch * each:,} tokens of KV cache, and there is room for {engine.cache_tokens:,}"
        )
