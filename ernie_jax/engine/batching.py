"""From sequences to the arrays of a step: runs of tokens packed into one of a few static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ernie_jax.ops import RaggedBatch


@dataclasses.dataclass(frozen=True)
class Run:
    """New tokens of one sequence: `tokens` at positions start, start + 1, ... over the sequence's pages.

    A negative token -1 - s stands for the one last sampled in slot s, which only the device knows.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The static shape of a step: T tokens and B rows of all data groups, and what one group may have of them.

    Attributes:
      pages: width of the page tables.
      query: most new tokens of a row.
    """

    tokens: int
    rows: int
    group_tokens: int
    group_rows: int
    pages: int
    query: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One step on the host: the runs of each data group, one group after the other.

    Attributes:
      tokens: [T] int32.
      last: [B] int32 index of each row's last token; unused rows repeat the first.
      starts: [B + 1] int32 first token of each row; rows are numbered through all groups.
      groups: a RaggedBatch for each group.
      group_starts, group_counts: [G] int32 which of the tokens are a group's.
    """

    shape: StepShape
    tokens: np.ndarray
    last: np.ndarray
    starts: np.ndarray
    groups: list[RaggedBatch]
    group_starts: np.ndarray
    group_counts: np.ndarray


def bucket(count: int, most: int, factor: int = 4, least: int = 1) -> int:
    """Round up to least * factor**n, at most `most` (which need not be such a number itself)."""
    size = least
    while size < count:
        size *= factor
    return min(size, most)


def build_step(
    runs: Sequence[Sequence[Run]], *, tokens: int, rows: int, page_size: int, max_pages: int, scratch_page: int
) -> Step:
    """Pack the runs of each data group.

    Args:
      tokens, rows: the static T and B; at least what the runs of all groups need.
      max_pages: pages of the longest sequence allowed; the table's width is a bucket below it.
      scratch_page: entry of unused places in the page tables.
    """
    counts = [sum(len(run.tokens) for run in group) for group in runs]
    lengths = [len(run.tokens) for group in runs for run in group]
    group_tokens = _share(tokens, len(runs), max(counts))
    group_rows = _share(rows, len(runs), max(len(group) for group in runs))
    needed = max(-(-(run.start + len(run.tokens)) // page_size) for group in runs for run in group)
    pages = bucket(needed, max_pages, least=max(1, 512 // page_size))
    query = group_tokens if group_rows == 1 else bucket(max(lengths), group_tokens, factor=8)
    ids = np.zeros(tokens, np.int32)
    ids[: sum(lengths)] = [token for group in runs for run in group for token in run.tokens]
    starts = np.full(rows + 1, sum(lengths), np.int32)
    starts[: len(lengths) + 1] = np.cumsum([0, *lengths])
    last = np.zeros(rows, np.int32)
    last[: len(lengths)] = starts[1 : len(lengths) + 1] - 1
    sizes = {"tokens": group_tokens, "rows": group_rows, "pages": pages, "query": query}
    return Step(
        StepShape(tokens, rows, group_tokens, group_rows, pages, query),
        ids,
        last,
        starts,
        [build_batch(group, page_size=page_size, scratch_page=scratch_page, **sizes) for group in runs],
        np.cumsum([0, *counts[:-1]], dtype=np.int32),
        np.array(counts, np.int32),
    )


def build_batch(
    runs: Sequence[Run], *, tokens: int, rows: int, pages: int, query: int, page_size: int, scratch_page: int
) -> RaggedBatch:
    """Describe the runs of one data group to its attention, in arrays of the given static sizes."""
    lengths = [len(run.tokens) for run in runs]
    positions = np.zeros(tokens, np.int32)
    batch_rows = np.full(tokens, rows, np.int32)
    starts = np.full(rows + 1, sum(lengths), np.int32)
    starts[: len(runs) + 1] = np.cumsum([0, *lengths])
    kv_lengths = np.zeros(rows, np.int32)
    table = np.full((rows, pages), scratch_page, np.int32)
    for row, (run, length) in enumerate(zip(runs, lengths, strict=True)):
        here = slice(starts[row], starts[row] + length)
        end = run.start + length
        positions[here] = np.arange(run.start, end)
        batch_rows[here] = row
        kv_lengths[row] = end
        count = -(-end // page_size)
        table[row, :count] = run.pages[:count]
    return RaggedBatch(positions, batch_rows, starts, kv_lengths, table, max_query=query)


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


def _share(total: int, groups: int, most: int) -> int:
    """Return how much of a static size a group gets: an even share if that is enough for all, else the whole."""
    even = -(-total // groups)
    return even if most <= even else total
