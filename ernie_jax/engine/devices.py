"""Devices: what an engine keeps on the devices, and the few things that it does there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from ernie_jax.engine.batching import StepShape
from ernie_jax.engine.sampler import Sampler, Settings, Stages
from ernie_jax.engine.sampling import SampleOutput, SamplingParams
from ernie_jax.engine.step import DeviceStep, StepOutput
from ernie_jax.ops.pages import Pages


class Devices:
    """Run an engine's programs, each on what those before have left on the devices.

    All that comes in is from the host, so processes that make the same calls in the same order run the same programs on
    the same data.

    Attributes:
      pages: the cache, an entry for each layer.
    """

    def __init__(self, step: DeviceStep, sampler: Sampler, make_pages: Callable[[], list[Pages]]):
        self.step, self.sampler, self.make_pages = step, sampler, make_pages
        self.reset()

    def reset(self) -> None:
        """Empty the cache, forget all settings and tokens, and count experts from nothing again."""
        self.pages: list[Pages] = []  # free before there are others
        self._sampled: tuple[jax.Array, jax.Array] | None = None
        self._following: jax.Array | None = None
        self._experts: jax.Array | tuple[()] = ()
        self.pages = self.make_pages()
        self.sampler.reset()
        self.step.reset_load()

    @property
    def load(self) -> jax.Array | tuple[()]:
        """The counts of experts since the last reset, as `DeviceStep.load`."""
        return self.step.load

    def forward(self, shape: StepShape, packed: np.ndarray | None = None) -> StepOutput:
        """Run a step.

        Args:
          packed: the step, by `batching.pack`; None: the one that follows the last, of the same shape, which is on the
            devices already.
        """
        placed = self._following if packed is None else self.step.place(packed)
        self._sampled = None  # no room for the logits of two steps
        out, self.pages = self.step.forward(self.pages, self.sampler.last_tokens, placed, shape)
        self._sampled, self._following, self._experts = (out.logits, out.rows), out.following, out.experts
        return out

    def experts(self) -> jax.Array:
        """Return the experts [L, B, k] of the last step's rows, on a device of this process."""
        return self.step.gather_experts(self._experts)

    def sample(self, stages: Stages, mask: np.ndarray | None = None) -> SampleOutput:
        """Sample the rows of the last step, as `Sampler.sample`."""
        sampled, self._sampled = self._sampled, None
        return self.sampler.sample(*sampled, stages, mask)

    def lay_out(self, params: Iterable[SamplingParams]) -> None:
        """Make room for settings, as `Sampler.lay_out`."""
        self.sampler.lay_out(params)

    def set(self, settings: Sequence[Settings]) -> None:
        """Put settings into their slots, as `Sampler.set`."""
        self.sampler.set(settings)

    def settle(self) -> None:
        """Wait until all that was dispatched is done."""
        jax.block_until_ready((self.pages, self.sampler.last_tokens))

    def freeze(self) -> None:
        """Leave what there is of Python's objects out of its search for garbage, until `gc.unfreeze`.

        Of compiled programs JAX keeps hundreds of thousands. Whenever Python looked among them, every some hundred
        steps, all sequences would stand still for half a second.
        """
        gc.collect()
        gc.freeze()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits [T, V] after each token of one sequence [T], without the cache."""
        return np.asarray(self.step.logits(tokens).addressable_data(0))
