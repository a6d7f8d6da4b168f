"""Training data: documents packed into rows, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import bisect
import fractions
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ernie_jax import distributed
from ernie_jax.config import ModelConfig, read_json
from ernie_jax.errors import UserError
from ernie_jax.train.documents import Documents
from ernie_jax.train.losses import IGNORED
from ernie_jax.train.packing import Plan, plan_stream, plan_whole
from ernie_jax.train.recipe import Recipe
from ernie_jax.train.sources import SourceFile, read_files, read_sources


class Batch(NamedTuple):
    """B rows of T tokens, int32 [B, T] each.

    Attributes:
      tokens: token ids.
      positions: position in the document, counted from where the row begins to show it.
      segments: which of the row's documents; documents of different segments never see each other. -1 is padding.
      targets: the next token of the same document, IGNORED where there is none or it is not to be learnt.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray


class PreferenceBatch(NamedTuple):
    """Pairs of answers: segment s of row b is in `chosen` and in `rejected` of the same pair.

    Attributes:
      chosen, rejected: rows whose targets are the answers.
      pairs: [B, S] int32 number of each segment's pair in the training data, the same in all epochs; -1 is padding. S
        is `PreferenceData.segments`.
      reference: [B, S] float32 each, the log-probabilities of the chosen and of the rejected answers by the model that
        a run started from; None where they are not known.
    """

    chosen: Batch
    rejected: Batch
    pairs: np.ndarray
    reference: tuple[np.ndarray, np.ndarray] | None = None


def batch_sides(batch: Batch | PreferenceBatch) -> tuple[Batch, ...]:
    """Return all the rows of a batch: of pairs, the chosen and the rejected answers'."""
    return (batch,) if isinstance(batch, Batch) else (batch.chosen, batch.rejected)


class Part(NamedTuple):
    """Examples, and how often an epoch shows each; `sides` are one, or the chosen and the rejected answers."""

    sides: tuple[Documents, ...]
    times: float = 1


class _Rows:
    """An endless sequence of packed rows: each epoch shows all examples and ends with rows that may be empty.

    Args:
      rows: of a batch.
      length: tokens of a row, below which no example may be that has to stand whole.
      seed: shuffles the examples of an epoch; None leaves them in order.
    """

    def __init__(self, parts: Sequence[Part], rows: int, length: int, seed: int | None):
        self._parts, self._rows, self._length, self._seed = parts, rows, length, seed
        sizes = [np.stack([side.lengths for side in part.sides], axis=1) for part in parts]
        self._lengths = np.concatenate(sizes)
        self._firsts = np.cumsum([0, *map(len, sizes)])  # each part's first document
        self._cuts = all(side.learnt is None for part in parts for side in part.sides)
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self._ends: list[int] = []  # the step that each epoch ends before

    def steps(self, epochs: int) -> int:
        """Return how many steps so many epochs take."""
        while len(self._ends) < epochs:
            steps = -(-len(self._plan(len(self._ends))) // self._rows)
            self._ends.append(steps + (self._ends[-1] if self._ends else 0))
        return self._ends[epochs - 1] if epochs else 0

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that a step belongs to."""
        while not self._ends or self._ends[-1] <= step:
            self.steps(len(self._ends) + 1)
        return bisect.bisect_right(self._ends, step)

    def efficiency(self, epoch: int = 0) -> float:
        """Return which part of the places in an epoch's rows holds a token."""
        plan = self._plan(epoch)
        return float(plan.sizes.sum() / (len(plan) * self._length * plan.sizes.shape[1]))

    def contents(self, step: int) -> list[list[tuple[int, int]]]:
        """Return which examples stand in each row of a step's batch, as (part, index in it), segment by segment."""
        plan, first = self._at(step)
        ends = plan.begins[first : first + self._rows + 1]
        return [
            [self._locate(document) for document in plan.documents[begin:end]]
            for begin, end in zip(ends[:-1], ends[1:], strict=True)
        ]

    def first_epoch(self) -> list[Any]:
        """Return the batches that show each example of the first epoch."""
        return [self._make(step) for step in range(self.steps(1))]

    def _make(self, step: int) -> Any:
        raise NotImplementedError

    def _at(self, step: int) -> tuple[Plan, int]:
        """Return the plan of a step's epoch, and the step's first row in it."""
        epoch = self.epoch(step)
        return self._plan(epoch), (step - self.steps(epoch)) * self._rows

    def _make_plan(self, epoch: int) -> Plan:
        documents = np.concatenate([self._turn(index, epoch) for index in range(len(self._parts))])
        if not len(documents):
            raise UserError("an epoch shows no example: make the sources' times larger")
        random = None if self._seed is None else np.random.default_rng([self._seed, epoch])
        if random:
            documents = documents[random.permutation(len(documents))]
        if self._cuts:
            return plan_stream(documents, self._lengths[:, 0], self._length)
        plan = plan_whole(documents, self._lengths, self._length)
        return plan.shuffled(random) if random else plan

    def _turn(self, index: int, epoch: int) -> np.ndarray:
        """Return the documents of a part that are an epoch's: the next so many of one shuffle after the other."""
        first, count = self._firsts[index], self._firsts[index + 1] - self._firsts[index]
        share = fractions.Fraction(str(self._parts[index].times)) * int(count)
        begin, end = int(epoch * share), int((epoch + 1) * share)
        found = []
        while begin < end:
            turn, place = divmod(begin, int(count))
            taken = min(int(count) - place, end - begin)
            order = np.arange(count)
            if taken < count:  # a whole turn needs no order, as all documents of an epoch are shuffled together
                # NumPy takes [seed, epoch], which shuffles those, for [seed, epoch, 0].
                order = np.random.default_rng([self._seed, index, turn + 1]).permutation(count)
            found.append(first + order[place : place + taken])
            begin += taken
        return np.concatenate([np.empty(0, np.int64), *found])

    def _locate(self, document: int) -> tuple[int, int]:
        part = bisect.bisect_right(self._firsts, document) - 1
        return part, int(document - self._firsts[part])

    def _side(self, plan: Plan, first: int, side: int) -> Batch:
        """Return the rows of one side from `first` on; beyond the last row they are empty."""
        batch = Batch(*(np.full((self._rows, self._length), value, np.int32) for value in (0, 0, -1, IGNORED)))
        for row in range(min(self._rows, len(plan) - first)):
            place = 0
            for segment, piece in enumerate(range(*plan.begins[first + row : first + row + 2])):
                part, index = self._locate(plan.documents[piece])
                tokens, starts, lengths, learnt = self._parts[part].sides[side]
                offset, size = int(plan.offsets[piece]), int(plan.sizes[piece, side])
                begin, end = starts[index] + offset, starts[index] + lengths[index]
                shown = slice(place, place + size)
                batch.tokens[row, shown] = tokens[begin : begin + size]
                batch.positions[row, shown] = np.arange(size)
                batch.segments[row, shown] = segment
                following = slice(begin + 1, min(begin + size + 1, end))
                targets = batch.targets[row, place : place + following.stop - following.start]
                np.copyto(targets, tokens[following], where=True if learnt is None else learnt[following])
                place += size
        return batch


class TrainingData(_Rows):
    """An endless sequence of batches: each epoch shuffles all documents.

    Where only parts of documents are learnt, each stands whole in a row, as an answer without its question teaches
    nothing, and rows are filled as well as they can be; else documents are cut wherever a row is full.
    """

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        return self._make(step)

    def _make(self, step: int) -> Batch:
        return self._side(*self._at(step), 0)


class PreferenceData(_Rows):
    """An endless sequence of batches of pairs: each epoch shuffles all pairs.

    Attributes:
      count: of different pairs.
      segments: no row has more pairs.
    """

    def __init__(self, parts: Sequence[Part], rows: int, length: int, seed: int | None):
        super().__init__(parts, rows, length, seed)
        # An epoch of 1.2 turns may be the end of one, a whole one and the beginning of a third.
        turns = [math.ceil(part.times) + (part.times % 1 > 0) for part in parts]
        repeats = np.repeat(turns, np.diff(self._firsts))
        shortest = [np.sort(np.repeat(side, repeats)).cumsum() for side in self._lengths.T]
        self.count = len(self._lengths)
        self.segments = min(int((ends <= length).sum()) for ends in shortest)

    def batch(self, step: int) -> PreferenceBatch:
        """Return the batch of a step, counted from 0."""
        return self._make(step)

    def _make(self, step: int) -> PreferenceBatch:
        plan, first = self._at(step)
        pairs = np.full((self._rows, self.segments), -1, np.int32)
        for row in range(min(self._rows, len(plan) - first)):
            found = plan.documents[slice(*plan.begins[first + row : first + row + 2])]
            pairs[row, : len(found)] = found
        return PreferenceBatch(self._side(plan, first, 0), self._side(plan, first, 1), pairs)


class Data(NamedTuple):
    """What a recipe trains on.

    Attributes:
      training: its batches; PreferenceData if its files have pairs.
      heldout: source -> batches that show each of its held-out examples once.
      digests: path -> what tells whether the file has changed.
    """

    training: TrainingData | PreferenceData
    heldout: dict[str, list[Batch] | list[PreferenceBatch]]
    digests: dict[str, str]


def load_data(recipe: Recipe, config: ModelConfig) -> Data:
    """Read the files of a recipe. Every process of several reads all, and makes the same batches.

    Raises:
      UserError: if a file is missing or broken or differs between processes, or a line is bad and the recipe does not
        skip bad lines.
    """
    files = list(survey(recipe, config))
    for file in files:
        if file.bad and not recipe.skip_bad_lines:
            number, reason = file.bad[0]
            more = f" (and {len(file.bad) - 1} more, which `main.py data` lists)" if len(file.bad) > 1 else ""
            raise UserError(f"{file.path}, {file.unit} {number}: {reason}{more}; skip_bad_lines = true leaves it out")
        if file.bad:
            distributed.say(f"{file.path}: {len(file.bad)} of {file.lines} {file.unit}s are bad and left out")
        for count, what in ((file.truncated, "cut off"), (file.skipped, "left out")):
            if count:
                distributed.say(
                    f"{file.path}: {count} of {len(file.numbers) + file.skipped} examples too long and {what}"
                )
    data = assemble(files, recipe)
    distributed.agree({f"the data file {path}": digest for path, digest in data.digests.items()})
    return data


def survey(recipe: Recipe, config: ModelConfig) -> Iterator[SourceFile]:
    """Read the files of a recipe one by one, with what is bad in them.

    Raises:
      UserError: if one is missing or can't be read at all.
    """
    sources = read_sources(recipe.sources)
    return read_files(sources, recipe.data, recipe.directory, config, recipe.sequence_length, recipe.long_examples)


def assemble(files: Sequence[SourceFile], recipe: Recipe) -> Data:
    """Make the batches of a recipe from its files.

    Raises:
      UserError: if a file has no good example, or only some have pairs.
    """
    for file in files:
        if not len(file.numbers):
            raise UserError(f"{file.path}: none of its {file.lines} {file.unit}s can be learnt from")
        if file.is_pairs != files[0].is_pairs:
            pairs, other = (file, files[0]) if file.is_pairs else (files[0], file)
            raise UserError(
                f"{pairs.path} has pairs of answers and {other.path} has none: they can't be trained on together"
            )
    kind = PreferenceData if files[0].is_pairs else TrainingData
    shape = recipe.batch_size, recipe.sequence_length
    training = [Part(file.sides, file.source.times) for file in files if file.split == "train"]
    heldout = {
        file.source.name: kind([Part(file.sides)], *shape, None).first_epoch()
        for file in files
        if file.split == "heldout"
    }
    digests = {file.path: file.digest for file in files}
    return Data(kind(training, *shape, recipe.seed), heldout, digests)


def claim_data(output: epath.Path, digests: Mapping[str, str], step: int) -> None:
    """Write down what a run is trained on; before it goes on from a step, check that it is still the same.

    Raises:
      UserError: if a file has changed or is another.
    """
    file = output / "data.json"
    if step and file.exists():
        stored = read_json(file)
        if changed := [path for path, digest in stored.items() if digests.get(path) != digest]:
            raise UserError(
                f"data file {changed[0]} changed since step {step}'s checkpoint in {output}; put the old one back, or "
                "choose another output"
            )
    elif distributed.is_primary():
        file.write_text(json.dumps(digests, indent=2) + "\n")
