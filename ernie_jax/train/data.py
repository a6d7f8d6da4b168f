"""Training data: documents packed into rows, in an order that depends on the seed and the step alone."""

from __future__ import annotations

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
      segments: which of the row's documents; documents of different segments never see each other.
      targets: the next token of the same document, IGNORED where there is none.
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
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def read_documents(paths: Sequence[str | os.PathLike], end_token: int, vocab_size: int) -> Documents:
    """Read .npy files of token ids in which every document is closed by the end token.

    Raises:
      UserError: if a file is missing, holds something else, or has ids beyond the vocabulary.
    """
    parts = []
    for path in paths:
        try:
            with epath.Path(path).open("rb") as file:
                tokens = np.load(file)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: not a .npy file of numbers ({error})") from None
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
            raise UserError(f"{path}: expected a row of token ids, found {tokens.dtype} of shape {tokens.shape}")
        if tokens[-1] != end_token:
            raise UserError(f"{path}: the last document is not closed by the end token {end_token}")
        if not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise UserError(f"{path}: ids from {tokens.min()} to {tokens.max()} do not fit vocab_size {vocab_size}")
        parts.append(tokens)
    tokens = np.concatenate(parts)
    ends = np.flatnonzero(tokens == end_token) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return Documents(tokens, starts, ends - starts)


class Stream:
    """Documents in a given order as one stream of tokens, cut into rows wherever a row is full."""

    def __init__(self, documents: Documents, order: np.ndarray):
        self._tokens = documents.tokens
        self._starts = documents.starts[order]
        self._ends = np.cumsum(documents.lengths[order])  # in the stream
        self._begins = self._ends - documents.lengths[order]

    def __len__(self) -> int:
        """Give the number of tokens."""
        return int(self._ends[-1])

    def batch(self, start: int, rows: int, length: int) -> Batch:
        """Return the `rows` rows that begin at token `start`; beyond the end there are no targets."""
        index = start + np.arange(rows * length + 1)
        beyond = index >= len(self)
        index = np.minimum(index, len(self) - 1)
        document = np.searchsorted(self._ends, index, side="right")
        tokens = self._tokens[self._starts[document] + index - self._begins[document]].astype(np.int32)
        last = (document[:-1] != document[1:]) | beyond[1:]
        targets = np.where(last, IGNORED, tokens[1:])
        row_starts = np.repeat(index[:-1:length], length)
        positions = index[:-1] - np.maximum(self._begins[document[:-1]], row_starts)
        segments = document[:-1] - np.repeat(document[:-1:length], length)
        parts = (tokens[:-1], positions, segments, targets)
        return Batch(*(part.reshape(rows, length).astype(np.int32) for part in parts))


class TrainingData:
    """An endless sequence of batches: each epoch shuffles all documents and leaves out what fills no whole batch.

    Raises:
      UserError: if the documents fill not even one batch.
    """

    def __init__(self, documents: Documents, rows: int, length: int, seed: int):
        self._documents, self._rows, self._length, self._seed = documents, rows, length, seed
        self.steps_per_epoch = (len(documents.tokens) - 1) // (rows * length)
        if not self.steps_per_epoch:
            raise UserError(
                f"the training data has {len(documents.tokens)} tokens, less than one batch of {rows} x {length}; "
                "make batch_size or sequence_length smaller"
            )
        self._epoch = functools.lru_cache(maxsize=1)(self._shuffled)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch).batch(index * self._rows * self._length, self._rows, self._length)

    def _shuffled(self, epoch: int) -> Stream:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._documents.starts))
        return Stream(self._documents, order)


def heldout_batches(documents: Documents, rows: int, length: int) -> list[Batch]:
    """Return every token of held-out documents once, in order."""
    stream = Stream(documents, np.arange(len(documents.starts)))
    return [stream.batch(start, rows, length) for start in range(0, len(stream), rows * length)]
