"""Packing: which piece of which document stands in which row, decided from the lengths alone."""

from __future__ import annotations

import bisect
import operator
from typing import NamedTuple

import numpy as np

_WINDOW = 4096  # documents that are placed together, the longest first
_OPEN = 64  # rows of a window, the emptiest, that those of the next may still go into


class Plan(NamedTuple):
    """Pieces of documents, row after row.

    Attributes:
      documents: [pieces] index of the document, or of the pair of documents.
      offsets: [pieces] where in the document the piece begins.
      sizes: [pieces, sides] its tokens: one side, or the chosen and the rejected one.
      begins: [rows + 1] each row's first piece.
    """

    documents: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    begins: np.ndarray

    def __len__(self) -> int:
        return len(self.begins) - 1

    def shuffled(self, random: np.random.Generator) -> Plan:
        """Return the same rows in another order."""
        order = random.permutation(len(self))
        counts = np.diff(self.begins)[order]
        begins = np.concatenate([[0], np.cumsum(counts)])
        pieces = np.repeat(self.begins[:-1][order] - begins[:-1], counts) + np.arange(begins[-1])
        return Plan(self.documents[pieces], self.offsets[pieces], self.sizes[pieces], begins)


def plan_stream(order: np.ndarray, lengths: np.ndarray, capacity: int) -> Plan:
    """Lay documents one after the other and cut wherever a row is full."""
    ends = np.cumsum(lengths[order])  # in the stream
    cuts = np.union1d(ends, np.arange(capacity, ends[-1], capacity))
    starts = np.concatenate([[0], cuts[:-1]])
    place = np.searchsorted(ends, starts, side="right")
    offsets = starts - (ends - lengths[order])[place]
    rows = -(-int(ends[-1]) // capacity)
    begins = np.searchsorted(starts // capacity, np.arange(rows + 1))
    return Plan(order[place], offsets, (cuts - starts)[:, None], begins)


def plan_whole(order: np.ndarray, lengths: np.ndarray, capacity: int) -> Plan:
    """Put each document whole where it fits best; those longer than a row are cut into pieces first.

    Args:
      lengths: [documents, sides]; a pair stands in the same row on both sides, and none of its sides is ever cut.
    """
    counts = np.maximum(-(-lengths[order, 0] // capacity), 1)
    documents = np.repeat(order, counts)
    offsets = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    sizes = np.minimum(lengths[documents] - offsets[:, None], capacity)
    rows = best_fit(sizes, capacity)
    pieces = np.argsort(rows, kind="stable")
    begins = np.searchsorted(rows[pieces], np.arange(rows.max() + 2))
    return Plan(documents[pieces], offsets[pieces], sizes[pieces], begins)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row [pieces] that each piece goes into: of the rows where it fits, the one it fills most.

    Args:
      sizes: [pieces, sides], none above the capacity, which every side of a row has.
    """
    result = np.empty(len(sizes), np.int64)
    sides = list(map(tuple, sizes.tolist()))
    totals = sizes.sum(axis=1)
    rows: list[tuple[int, int, tuple[int, ...]]] = []  # what is free, the row's number, what is free on each side
    count = 0
    for first in range(0, len(sizes), _WINDOW):
        for piece in (first + np.argsort(-totals[first : first + _WINDOW], kind="stable")).tolist():
            needed = sides[piece]
            place = bisect.bisect_left(rows, (sum(needed),))
            while place < len(rows) and not all(map(operator.ge, rows[place][2], needed)):
                place += 1
            if place < len(rows):
                _, row, free = rows.pop(place)
            else:
                row, free, count = count, (capacity,) * len(needed), count + 1
            result[piece] = row
            free = tuple(map(operator.sub, free, needed))
            bisect.insort(rows, (sum(free), row, free))
        rows = rows[-_OPEN:]
    return result
