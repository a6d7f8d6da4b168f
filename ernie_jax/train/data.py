"""Training data: documents packed into rows, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from ernie_jax.errors import UserError
from ernie_jax.train.losses import IGNORED


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


class Documents(NamedTuple):
    """Documents one after the other.

    Attributes:
      tokens: [T] token ids.
      starts: [documents] index of each document's first token.
      lengths: [documents] its number of tokens, the end token included.
      learnt: [T] bool, which tokens are to be predicted; None is all of them.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    learnt: np.ndarray | None


def read_documents(paths: Sequence[str | os.PathLike], end_token: int, vocab_size: int) -> Documents:
    """Read .npy files of token ids in which every document is closed by the end token.

    Beside NAME.npy there may be NAME.learnt.npy, a bool for each token: whether it is to be predicted. Prompts are not.

    Raises:
      UserError: if a file is missing, holds something else, or has ids beyond the vocabulary, or if only some have a
        file of what is learnt.
    """
    parts, masks = [], []
    for path in map(epath.Path, paths):
        tokens = _load(path)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
            raise UserError(f"{path}: expected a row of token ids, found {tokens.dtype} of shape {tokens.shape}")
        if tokens[-1] != end_token:
            raise UserError(f"{path}: the last document is not closed by the end token {end_token}")
        if not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise UserError(f"{path}: ids from {tokens.min()} to {tokens.max()} do not fit vocab_size {vocab_size}")
        parts.append(tokens)
        if (mask_path := path.with_suffix(".learnt.npy")).exists():
            masks.append(_load(mask_path))
            if masks[-1].dtype != bool or masks[-1].shape != tokens.shape:
                raise UserError(f"{mask_path}: expected a bool for each of the {len(tokens)} tokens of {path.name}")
    if masks and len(masks) < len(parts):
        raise UserError(f"{', '.join(map(str, paths))}: only some have a file .learnt.npy; all must, or none")
    tokens = np.concatenate(parts)
    ends = np.flatnonzero(tokens == end_token) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return Documents(tokens, starts, ends - starts, np.concatenate(masks) if masks else None)


def _load(path: epath.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy file of numbers ({error})") from None


class Stream:
    """Documents in a given order as one stream of tokens, cut into rows wherever a row is full: all is learnt."""

    def __init__(self, documents: Documents, order: np.ndarray, length: int):
        self._tokens = documents.tokens
        self._length = length
        self._starts = documents.starts[order]
        self._ends = np.cumsum(documents.lengths[order])  # in the stream
        self._begins = self._ends - documents.lengths[order]

    def __len__(self) -> int:
        """Give the number of rows, the last of which may not be full."""
        return -(-int(self._ends[-1]) // self._length)

    def batch(self, first: int, rows: int) -> Batch:
        """Return the `rows` rows from `first` on; beyond the end there are no targets."""
        length = self._length
        index = first * length + np.arange(rows * length + 1)
        beyond = index >= self._ends[-1]
        index = np.minimum(index, self._ends[-1] - 1)
        document = np.searchsorted(self._ends, index, side="right")
        tokens = self._tokens[self._starts[document] + index - self._begins[document]].astype(np.int32)
        last = (document[:-1] != document[1:]) | beyond[1:]
        targets = np.where(last, IGNORED, tokens[1:])
        row_starts = np.repeat(index[:-1:length], length)
        positions = index[:-1] - np.maximum(self._begins[document[:-1]], row_starts)
        segments = document[:-1] - np.repeat(document[:-1:length], length)
        parts = (tokens[:-1], positions, segments, targets)
        return Batch(*(part.reshape(rows, length).astype(np.int32) for part in parts))


class Rows:
    """Documents of which each stands whole in one row: a row ends where the next one does not fit.

    Raises:
      UserError: if a document is longer than a row.
    """

    def __init__(self, documents: Documents, length: int):
        if (longest := documents.lengths.max()) > length:
            raise UserError(
                f"document {documents.lengths.argmax()} of the training data has {longest} tokens, and rows have "
                f"{length}: make sequence_length larger or leave it out"
            )
        self._documents, self._length = documents, length
        begins, used = [0], 0  # the rows' first documents
        for index, size in enumerate(documents.lengths):
            if used + size > length:
                begins.append(index)
                used = 0
            used += size
        self._rows = np.stack([begins, [*begins[1:], len(documents.lengths)]], axis=1)

    def __len__(self) -> int:
        return len(self._rows)

    def shuffled(self, random: np.random.Generator) -> Rows:
        """Return the same rows in another order."""
        other = copy.copy(self)
        other._rows = random.permutation(self._rows)
        return other

    def batch(self, first: int, rows: int) -> Batch:
        """Return the `rows` rows from `first` on; beyond the end they are empty."""
        batch = Batch(*(np.full((rows, self._length), value, np.int32) for value in (0, 0, -1, IGNORED)))
        tokens, starts, lengths, learnt = self._documents
        for row, (begin, end) in enumerate(self._rows[first : first + rows]):
            place = 0
            for segment, document in enumerate(range(begin, end)):
                size = lengths[document]
                source = slice(starts[document], starts[document] + size)
                shown = slice(place, place + size)
                batch.tokens[row, shown] = tokens[source]
                batch.positions[row, shown] = np.arange(size)
                batch.segments[row, shown] = segment
                following = tokens[source][1:]
                np.copyto(batch.targets[row, shown][:-1], following, where=learnt[source][1:])
                place += size
        return batch


class TrainingData:
    """An endless sequence of batches: each epoch shuffles all documents and leaves out what fills no whole batch.

    Where only parts of documents are learnt, they stand whole in their rows, as an answer without its question teaches
    nothing; else they are cut wherever a row is full.

    Raises:
      UserError: if the documents fill not even one batch.
    """

    def __init__(self, documents: Documents, rows: int, length: int, seed: int):
        self._documents, self._rows, self._length, self._seed = documents, rows, length, seed
        self._packed = None if documents.learnt is None else Rows(documents, length)
        full = (len(documents.tokens) - 1) // length if self._packed is None else len(self._packed)
        self.steps_per_epoch = full // rows
        if not self.steps_per_epoch:
            raise UserError(
                f"the training data has {len(documents.tokens)} tokens, less than one batch of {rows} x {length}; "
                "make batch_size or sequence_length smaller"
            )
        self._epoch = functools.lru_cache(maxsize=1)(self._shuffled)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch).batch(index * self._rows, self._rows)

    def _shuffled(self, epoch: int) -> Stream | Rows:
        random = np.random.default_rng([self._seed, epoch])
        if self._packed is not None:
            return self._packed.shuffled(random)
        return Stream(self._documents, random.permutation(len(self._documents.starts)), self._length)


def heldout_batches(documents: Documents, rows: int, length: int) -> list[Batch]:
    """Return every target of held-out documents once, in order."""
    in_order = np.arange(len(documents.starts))
    packed = Stream(documents, in_order, length) if documents.learnt is None else Rows(documents, length)
    return [packed.batch(first, rows) for first in range(0, len(packed), rows)]
