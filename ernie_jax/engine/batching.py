"""From sequences to the arrays of a step: runs of tokens packed into one of a few static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ernie_jax.ops import RaggedBatch


@dataclasses.dataclass(frozen=True)
class Run:
    """New tokens of one sequence: `tokens` at positions start, start + 1, ... over the sequence's pages."""

    tokens: Sequence[int]  # -1: the token last sampled in the row's slot
    start: int
    pages: Sequence[int]


def bucket(count: int, most: int, factor: int = 4, least: int = 1) -> int:
    """Round up to least * factor**n, at most `most` (which need not be such a number itself)."""
    size = least
    while size < count:
        size *= factor
    return min(size, most)


def build_batch(runs: Sequence[Run], *, tokens: int, rows: int, page_size: int, max_pages: int, scratch_page: int):
    """Pack runs into a RaggedBatch of NumPy arrays.

    Args:
      tokens, rows: the static T and B; at least what the runs need.
      max_pages: pages of the longest sequence allowed; the table's width is a bucket below it.
      scratch_page: entry of unused places in the page table.
    """
    lengths = [len(run.tokens) for run in runs]
    batch_tokens, positions = np.zeros((2, tokens), np.int32)
    batch_rows = np.full(tokens, rows, np.int32)
    starts = np.full(rows + 1, sum(lengths), np.int32)
    starts[: len(runs) + 1] = np.cumsum([0, *lengths])
    kv_lengths = np.zeros(rows, np.int32)
    needed = [-(-(run.start + len(run.tokens)) // page_size) for run in runs]
    least = max(1, 512 // page_size)
    table = np.full((rows, bucket(max(needed), max_pages, least=least)), scratch_page, np.int32)
    for row, (run, length, count) in enumerate(zip(runs, lengths, needed, strict=True)):
        here = slice(starts[row], starts[row] + length)
        batch_tokens[here] = run.tokens
        positions[here] = np.arange(run.start, run.start + length)
        batch_rows[here] = row
        kv_lengths[row] = run.start + length
        table[row, :count] = run.pages[:count]
    query = tokens if rows == 1 else bucket(max(lengths), tokens, factor=8)
    return RaggedBatch(batch_tokens, positions, batch_rows, starts, kv_lengths, table, max_query=query)


def take_chunks(waiting: Sequence[int], budget: int, rows: int) -> list[int]:
    """Say how many tokens of each waiting run go into the next step, in order: at most `budget` tokens, `rows` runs.

    The reference attention pads all runs of a step to the longest, so a run joins only while that stays within twice
    the budget.
    """
    chunks: list[int] = []
    left = budget
    for length in waiting[:rows]:
        chunk = min(length, left)
        if chunk == 0 or (chunks and (len(chunks) + 1) * max(*chunks, chunk) > 2 * budget):
            break
        chunks.append(chunk)
        left -= chunk
    return chunks
