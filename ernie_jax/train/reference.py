"""The reference of preference training: how likely the model that a run starts from finds each answer."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator

import numpy as np
from etils import epath
from tqdm import tqdm

from ernie_jax import adapter, checkpoint, distributed
from ernie_jax.errors import UserError
from ernie_jax.train.data import Data, PreferenceBatch
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.trainer import Trainer, TrainState
from ernie_jax.train.watch import Interrupts

_TRAINING = "training"


def needs_reference(recipe: Recipe) -> bool:
    """Tell whether what a recipe minimises takes the reference's log-probabilities."""
    options = recipe.preference_options
    return options is not None and options.needs_reference


class Reference:
    """Log-probabilities of the answers that a run compares, computed once and kept in its output."""

    def __init__(self, recipe: Recipe, output: epath.Path, data: Data):
        self._recipe, self._file, self._data = recipe, output / "reference.npz", data
        counts = {_TRAINING: data.training.count}
        counts |= {_heldout(name): 1 + max(int(b.pairs.max()) for b in held) for name, held in data.heldout.items()}
        self._known = {name: np.full((count, 2), np.nan, np.float32) for name, count in counts.items()}

    def compute(self, trainer: Trainer, first: TrainState, interrupts: Interrupts, progress: bool) -> None:
        """Read what an earlier run computed, and compute what is missing with the first state of all.

        Only those pairs of the training data are looked at that a step shows.

        Raises:
          UserError: if an earlier run did it of other files or weights.
          KeyboardInterrupt: after a signal to end, when what is known is saved.
        """
        manifest = checkpoint.read_manifest(self._recipe.checkpoint)
        told = json.dumps(manifest, sort_keys=True) + adapter.fingerprint(first.parameters | first.frozen, manifest)
        made_of = self._data.digests | {self._recipe.checkpoint: hashlib.sha256(told.encode()).hexdigest()}
        if self._file.exists():
            self._read(made_of)
        computed = 0
        with tqdm(desc="reference", unit="batch", disable=not progress) as bar:
            for name, batch in self._missing():
                found = np.stack(trainer.logprobs(first, trainer.place(batch)), axis=-1)
                new = (batch.pairs >= 0) & np.isnan(self._known[name][batch.pairs, 0])
                self._known[name][batch.pairs[new]] = found[new]
                computed += 1
                bar.update()
                ends = any(distributed.gather(interrupts.heard))  # whichever process was told to
                if ends or computed % self._recipe.save_every == 0:
                    self._save(made_of)
                if ends:
                    distributed.barrier("all is saved")
                    raise KeyboardInterrupt
        if computed:
            self._save(made_of)

    def batch(self, step: int) -> PreferenceBatch:
        """Return the batch of a step, counted from 0, with its numbers."""
        return self._complete(_TRAINING, self._data.training.batch(step))

    def heldout(self) -> dict[str, list[PreferenceBatch]]:
        """Return source -> its batches, with their numbers."""
        return {
            name: [self._complete(_heldout(name), batch) for batch in held] for name, held in self._data.heldout.items()
        }

    def _complete(self, name: str, batch: PreferenceBatch) -> PreferenceBatch:
        real = batch.pairs >= 0
        chosen, rejected = (np.where(real, side[batch.pairs], 0) for side in self._known[name].T)
        return batch._replace(reference=(chosen, rejected))

    def _missing(self) -> Iterator[tuple[str, PreferenceBatch]]:
        """Yield the batches that have pairs of which nothing is known: the same ones wherever an earlier run ended."""
        steps = itertools.takewhile(lambda _: np.isnan(self._known[_TRAINING]).any(), range(self._recipe.steps))
        training = ((_TRAINING, self._data.training.batch(step)) for step in steps)
        heldout = ((_heldout(name), batch) for name, held in self._data.heldout.items() for batch in held)
        for name, batch in itertools.chain(training, heldout):
            if np.isnan(self._known[name][batch.pairs[batch.pairs >= 0]]).any():
                yield name, batch

    def _read(self, made_of: dict[str, str]) -> None:
        with self._file.open("rb") as opened, np.load(opened) as stored:
            before = json.loads(str(stored["made_of"]))
            if changed := [name for name in before | made_of if before.get(name) != made_of.get(name)]:
                raise UserError(
                    f"{changed[0]} changed since {self._file} was computed with it; put the old one back, or choose "
                    "another output"
                )
            self._known = {name: stored[name] for name in self._known}

    def _save(self, made_of: dict[str, str]) -> None:
        if not distributed.is_primary():
            return
        unfinished = self._file.with_name("reference.unfinished.npz")
        with unfinished.open("wb") as opened:
            np.savez(opened, made_of=json.dumps(made_of), **self._known)
        unfinished.replace(self._file)


def _heldout(source: str) -> str:
    return f"held-out {source}"
