"""The sampler's place on the devices: a row of settings and the last token of every slot."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ernie_jax.engine.batching import NO_SLOT, bucket
from ernie_jax.engine.sampling import Features, SampleOutput, SamplerState, SamplingParams, build_rows
from ernie_jax.engine.step import DeviceStep


class Stages(enum.IntFlag):
    """Which groups of the sampler's stages a sequence needs; none for the likeliest token and nothing else."""

    DRAW = enum.auto()
    ADJUST = enum.auto()
    REPORT = enum.auto()

    @classmethod
    def of(cls, params: SamplingParams) -> Stages:
        adjusts = params.has_penalties or bool(params.logit_bias)
        return cls(cls.DRAW * (not params.is_greedy) | cls.ADJUST * adjusts | cls.REPORT * params.logprobs)

    def level(self, masked: bool) -> Stages:
        """Return the first of a few levels that has all of these, for a step with or without masks.

        Few, because each is a program for every number of rows. To read the logits once more for a stage that no row
        needs costs some 0.1 ms of a step (256 rows of 103,424 float32 at 3 TB/s are 0.035 ms); only the likeliest
        tokens of a report take longer, so that no other level has it. A mask makes the step wait for the host anyway.
        """
        return next(level for level in _LEVELS[masked] if self in level)

    @functools.cache
    def choose(self, features: Features) -> Features:
        """Return `features` without the groups that are not needed."""
        off = Features()
        fields = {
            Stages.DRAW: ("random", "top_k", "top_p", "min_p"),
            Stages.ADJUST: ("bias_width", "penalties"),
            Stages.REPORT: ("logprobs", "top_logprobs"),
        }
        unneeded = [name for stage, names in fields.items() if stage not in self for name in names]
        return dataclasses.replace(features, **{name: getattr(off, name) for name in unneeded})


_ALL = Stages.DRAW | Stages.ADJUST | Stages.REPORT
_LEVELS = {
    False: (Stages(0), Stages.DRAW, Stages.DRAW | Stages.ADJUST, _ALL),
    True: (Stages.DRAW, _ALL),
}


class Kind(NamedTuple):
    """A kind of sampling step, a program for each number of rows."""

    stages: Stages
    masked: bool


class Settings(NamedTuple):
    """How the sequence in a slot goes on: its settings, seed, prompt, and the tokens it has generated so far."""

    slot: int
    params: SamplingParams
    seed: int
    prompt: Sequence[int]
    output: Sequence[int]


class Sampler:
    """Sample the rows of steps, each by the settings of its slot.

    A program has every stage that was ever asked for, so that few are compiled, except the groups of stages that no row
    of a step needs.

    Attributes:
      last_tokens: [slots] int32, the last token sampled in each.
    """

    def __init__(self, step: DeviceStep, slots: int, put: Callable, vocab_size: int, valid_vocab: int):
        self._step = step
        self._slots = slots
        self._put = put
        self._vocab_size = vocab_size
        self._valid_vocab = valid_vocab
        self._features = Features()
        self.reset()

    def reset(self) -> None:
        """Forget all settings and tokens."""
        self.last_tokens: jax.Array = self._put(np.zeros(self._slots, np.int32))
        self._state: SamplerState = self._idle_state()

    def covers(self, params: Iterable[SamplingParams]) -> bool:
        """Tell whether the state on the devices has what these need."""
        return self._features.covers(Features.of(params))

    def lay_out(self, params: Iterable[SamplingParams]) -> None:
        """Make a state that covers these, too; every slot in use must then be set."""
        self._features = self._features.union(Features.of(params))
        self._state = self._idle_state()

    def set(self, settings: Sequence[Settings]) -> None:
        """Put settings into their slots."""
        size = bucket(len(settings), self._slots)  # few programs
        idle = Settings(NO_SLOT, SamplingParams(), 0, (), ())
        rows = [*settings, *[idle] * (size - len(settings))]
        slots = np.array([row.slot for row in rows], np.int32)
        self._state = self._step.set_rows(self._state, slots, self._rows(rows))

    def sample(
        self, logits: jax.Array, rows: jax.Array, stages: Stages, mask: np.ndarray | None = None
    ) -> SampleOutput:
        """Sample the rows of a step; the output is on its way to the host, one copy of it.

        Args:
          logits, rows: what the step returned.
          stages: those of all rows together.
          mask: [B, ceil(V / 32)] int32, the tokens allowed in each row, as bits; default: all.
        """
        out, self._state, self.last_tokens = self._step.sample(
            logits,
            self._state,
            self.last_tokens,
            rows,
            None if mask is None else self._put(mask),
            features=self._choose(stages, mask is not None),
            valid_vocab=self._valid_vocab,
        )
        out = jax.tree.map(lambda array: array.addressable_data(0), out)
        jax.tree.map(lambda array: array.copy_to_host_async(), out)
        return out

    def kinds(self, params: Iterable[SamplingParams], grammars: bool) -> list[Kind]:
        """Return the kinds of steps with sequences of these settings, in any combination; with masks if `grammars`."""
        each = {Stages.of(p) for p in params}
        several = (itertools.combinations(each, n) for n in range(len(each) + 1))
        combined = {functools.reduce(operator.or_, some, Stages(0)) for some in itertools.chain(*several)}
        pairs = itertools.product(sorted(combined), range(1 + grammars))
        chosen = {(self._choose(stages, bool(masked)), masked): Kind(stages, bool(masked)) for stages, masked in pairs}
        return list(chosen.values())

    def lower(self, logits: jax.Array, rows: jax.Array, kind: Kind) -> jax.stages.Lowered:
        """Lower what `sample` runs for a kind of step; the other arguments are those of `sample`."""
        return self._step.lower_sample(
            logits,
            self._state,
            self.last_tokens,
            rows,
            self._put(self.empty_mask(len(logits))) if kind.masked else None,
            features=self._choose(*kind),
            valid_vocab=self._valid_vocab,
        )

    def warm_up(self, logits: jax.Array, rows: jax.Array, kind: Kind) -> None:
        """Run a step of a kind in which nobody takes part."""
        self.sample(logits, rows, kind.stages, self.empty_mask(len(logits)) if kind.masked else None)

    def warm_up_settings(self) -> None:
        """Compile what `set` needs."""
        idle = Settings(NO_SLOT, SamplingParams(), 0, (), ())
        for size in {bucket(count, self._slots) for count in range(1, self._slots + 1)}:
            self.set([idle] * size)

    def empty_mask(self, rows: int) -> np.ndarray:
        """Return a mask [rows, ceil(V / 32)] that allows every token."""
        return np.full((rows, -(-self._vocab_size // 32)), -1, np.int32)

    def _choose(self, stages: Stages, masked: bool) -> Features:
        return stages.level(masked).choose(self._features)

    def _idle_state(self) -> SamplerState:
        idle = [Settings(slot, SamplingParams(), 0, (), ()) for slot in range(self._slots)]
        return jax.tree.map(self._put, self._rows(idle))

    def _rows(self, settings: Sequence[Settings]) -> SamplerState:
        return build_rows(
            [row.params for row in settings],
            [row.seed for row in settings],
            [row.prompt for row in settings],
            [row.output for row in settings],
            features=self._features,
            vocab_size=self._vocab_size,
        )
