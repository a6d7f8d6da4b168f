"""From sequences to the arrays of a step: runs of tokens packed into one of a few static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.ops import RaggedBatch

NO_SLOT = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Run:
    """New tokens of one sequence: `tokens` at positions start, start + 1, ... over the sequence's pages.

    A negative token -1 - s stands for the one last sampled in slot s, which only the device knows.

    Attributes:
      slot: where the token after these is sampled; NO_SLOT: it is not.
      index: which of the sequence's own tokens that is, 0 for the first.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    slot: int = NO_SLOT
    index: int = 0


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
      slots, indices: [B] int32 of each row's run.
      groups: a RaggedBatch for each group.
      group_starts, group_counts: [G] int32 which of the tokens are a group's.
    """

    shape: StepShape
    tokens: np.ndarray
    last: np.ndarray
    starts: np.ndarray
    slots: np.ndarray
    indices: np.ndarray
    groups: list[RaggedBatch]
    group_starts: np.ndarray
    group_counts: np.ndarray


def bucket(count: int, most: int, factor: int = 4, least: int = 1) -> int:
    """Round up to least * factor**n, at most `most` (which need not be such a number itself)."""
    size = least
    while size < count:
        size *= factor
    return min(size, most)


def table_width(needed: int, max_pages: int, page_size: int) -> int:
    """Return the static width of a page table for rows of up to `needed` pages."""
    return bucket(needed, max_pages, least=max(1, 512 // page_size))


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
    pages = table_width(needed, max_pages, page_size)
    query = group_tokens if group_rows == 1 else bucket(max(lengths), group_tokens, factor=8)
    ids = np.zeros(tokens, np.int32)
    ids[: sum(lengths)] = [token for group in runs for run in group for token in run.tokens]
    starts = np.full(rows + 1, sum(lengths), np.int32)
    starts[: len(lengths) + 1] = np.cumsum([0, *lengths])
    last = np.zeros(rows, np.int32)
    last[: len(lengths)] = starts[1 : len(lengths) + 1] - 1
    slots = np.full(rows, NO_SLOT, np.int32)
    slots[: len(lengths)] = [run.slot for group in runs for run in group]
    indices = np.zeros(rows, np.int32)
    indices[: len(lengths)] = [run.index for group in runs for run in group]
    sizes = {"tokens": group_tokens, "rows": group_rows, "pages": pages, "query": query}
    return Step(
        StepShape(tokens, rows, group_tokens, group_rows, pages, query),
        ids,
        last,
        starts,
        slots,
        indices,
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
        reserved = run.pages[:pages]  # also those that later steps will fill
        table[row, : len(reserved)] = reserved
    return RaggedBatch(positions, batch_rows, starts, kv_lengths, table, max_query=query)


class Packed(NamedTuple):
    """A step as one data group's shard sees it; the first six are the same in all groups.

    Attributes:
      tokens, last, slots, indices: as in Step.
      total: [1] how many of the tokens are no padding.
      start, count: [1] which of them are the group's.
      positions, rows, starts, lengths, table: of the group's RaggedBatch; the table is flat.
    """

    tokens: jax.Array
    last: jax.Array
    slots: jax.Array
    indices: jax.Array
    total: jax.Array
    start: jax.Array
    count: jax.Array
    positions: jax.Array
    rows: jax.Array
    starts: jax.Array
    lengths: jax.Array
    table: jax.Array

    def batch(self, shape: StepShape) -> RaggedBatch:
        """Return what the group's attention needs."""
        table = self.table.reshape(shape.group_rows, shape.pages)
        return RaggedBatch(self.positions, self.rows, self.starts, self.lengths, table, max_query=shape.query)

    def advance(self) -> Packed:
        """Return the decode step that follows this one, for the same sequences."""
        used = self.lengths > 0
        row = jnp.minimum(self.rows, len(used) - 1)
        return self._replace(
            indices=self.indices + 1,
            positions=self.positions + ((self.rows < len(used)) & used[row]),
            lengths=self.lengths + used,
        )


def packed_sizes(shape: StepShape) -> tuple[int, ...]:
    """Return the length of each field of a Packed."""
    tokens, rows = shape.group_tokens, shape.group_rows
    return (shape.tokens, *(shape.rows,) * 3, 1, 1, 1, tokens, tokens, rows + 1, rows, rows * shape.pages)


def pack(step: Step) -> np.ndarray:
    """Lay a step out as one int32 array [G, n], a row for each data group: one transfer."""
    rows = []
    for batch, start, count in zip(step.groups, step.group_starts, step.group_counts, strict=True):
        own = (batch.positions, batch.rows, batch.starts, batch.kv_lengths, batch.page_table.ravel())
        total = step.group_counts.sum()
        rows.append(np.concatenate([step.tokens, step.last, step.slots, step.indices, [total], [start], [count], *own]))
    return np.stack(rows).astype(np.int32)


def unpack(row: jax.Array, shape: StepShape) -> Packed:
    """Read a row of `pack`."""
    return Packed(*jnp.split(row, np.cumsum(packed_sizes(shape))[:-1]))


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
