"""Documents: token ids one after the other, from .npy files or from JSON lines rendered and tokenised once."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
from etils import epath

from ernie_jax.errors import UserError


class Documents(NamedTuple):
    """Documents somewhere in a row of tokens.

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

    def learnt_counts(self) -> np.ndarray:
        """Return how many tokens of each document are to be predicted; its first one never is."""
        if self.learnt is None:
            return self.lengths - 1
        until = np.concatenate([[0], np.cumsum(self.learnt, dtype=np.int64)])
        return until[self.starts + self.lengths] - until[self.starts + 1]


def read_documents(path: str | os.PathLike, end_token: int, vocab_size: int) -> Documents:
    """Read a .npy file of token ids in which every document is closed by the end token.

    Beside NAME.npy there may be NAME.learnt.npy, a bool for each token: whether it is to be predicted. Prompts are not.

    Raises:
      UserError: if a file is missing, holds something else, or has ids beyond the vocabulary.
    """
    path = epath.Path(path)
    tokens, learnt = _load(path), None
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise UserError(f"{path}: expected a row of token ids, found {tokens.dtype} of shape {tokens.shape}")
    if tokens[-1] != end_token:
        raise UserError(f"{path}: the last document is not closed by the end token {end_token}")
    if not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise UserError(f"{path}: ids from {tokens.min()} to {tokens.max()} do not fit vocab_size {vocab_size}")
    if (mask_path := learnt_path(path)).exists():
        learnt = _load(mask_path)
        if learnt.dtype != bool or learnt.shape != tokens.shape:
            raise UserError(f"{mask_path}: expected a bool for each of the {len(tokens)} tokens of {path.name}")
    ends = np.flatnonzero(tokens == end_token) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return Documents(tokens, starts, ends - starts, learnt)


def learnt_path(path: epath.Path) -> epath.Path:
    """Return where what is learnt of a .npy file stands."""
    return path.with_suffix(".learnt.npy")


def _load(path: epath.Path) -> np.ndarray:
    """Read a .npy file.

    Raises:
      UserError: if it is missing or no such file.
    """
    try:
        with path.open("rb") as file:
            return np.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy file of numbers ({error})") from None
