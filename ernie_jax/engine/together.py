"""How several processes run one engine: process 0 decides, and tells the others each thing to do on the devices.

They have no scheduler's state, no grammars and no clock. A step that follows another costs them a frame of some hundred
bytes, and one for its sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from ernie_jax.channel import Receiver, Sender
from ernie_jax.engine.batching import StepShape
from ernie_jax.engine.devices import Devices
from ernie_jax.engine.sampler import Settings, Stages
from ernie_jax.engine.sampling import SampleOutput, SamplingParams
from ernie_jax.engine.step import StepOutput


class LeadingDevices(Devices):
    """Process 0's devices: the others do what it does, told before it begins so that all begin at once."""

    def __init__(self, devices: Devices, sender: Sender):
        """Take over from `devices`, with an empty cache, here and there."""
        self._sender = sender
        devices.pages = []  # free before there are others
        super().__init__(devices.step, devices.sampler, devices.make_pages)

    def reset(self) -> None:
        self._sender.send("reset")
        super().reset()

    def forward(self, shape: StepShape, packed: np.ndarray | None = None) -> StepOutput:
        self._sender.send("forward", dataclasses.asdict(shape), [] if packed is None else [packed])
        return super().forward(shape, packed)

    def experts(self) -> jax.Array:
        if self.step.exchanges:  # then they come together over all processes
            self._sender.send("experts")
        return super().experts()

    def sample(self, stages: Stages, mask: np.ndarray | None = None) -> SampleOutput:
        if mask is None:
            self._sender.send("sample", int(stages))
        else:
            rows = np.flatnonzero((mask != -1).any(1)).astype(np.int32)  # the others allow everything
            self._sender.send("sample", int(stages), [np.array(len(mask), np.int32), rows, mask[rows]])
        return super().sample(stages, mask)

    def lay_out(self, params: Iterable[SamplingParams]) -> None:
        params = list(params)
        self._sender.send("lay_out", [dataclasses.asdict(p) for p in params])
        super().lay_out(params)

    def set(self, settings: Sequence[Settings]) -> None:
        facts = [(row.slot, dataclasses.asdict(row.params), row.seed) for row in settings]
        tokens = [np.array(part, np.int32) for row in settings for part in (row.prompt, row.output)]
        self._sender.send("set", facts, tokens)
        super().set(settings)

    def freeze(self) -> None:
        self._sender.send("freeze")
        super().freeze()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self._sender.send("logits", None, [tokens])
        return super().logits(tokens)

    def end(self) -> None:
        """Let the others go."""
        self._sender.send("end")


def follow(devices: Devices, receiver: Receiver) -> None:
    """Do what process 0 says until it ends.

    Raises:
      ConnectionError: if it goes without a word.
    """
    while True:
        word, fact, arrays = receiver.receive()
        match word:
            case "forward":
                devices.forward(StepShape(**fact), *arrays)
            case "experts":
                devices.experts()
            case "sample" if arrays:
                count, rows, allowed = arrays
                mask = devices.sampler.empty_mask(int(count))
                mask[rows] = allowed
                devices.sample(Stages(fact), mask)
            case "sample":
                devices.sample(Stages(fact))
            case "set":
                tokens = iter(arrays)
                devices.set([_settings(*row, next(tokens), next(tokens)) for row in fact])
            case "lay_out":
                devices.lay_out([SamplingParams(**params) for params in fact])
            case "freeze":
                devices.freeze()
            case "logits":
                devices.logits(*arrays)
            case "reset":
                devices.reset()
            case "end":
                return


def _settings(slot: int, params: dict, seed: int, prompt: np.ndarray, output: np.ndarray) -> Settings:
    return Settings(slot, SamplingParams(**params), seed, prompt.tolist(), output.tolist())
