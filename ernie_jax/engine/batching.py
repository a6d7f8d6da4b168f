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
NO_TOKEN = np.iinfo(np.int32).min  # padding


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
      decode: how many leading rows of a group have one token each, unused ones included; 0: that is not fixed.
      alignment: of a group's tokens behind those, each run begins at a multiple of so many.
    """

    tokens: int
    rows: int
    group_tokens: int
    group_rows: int
    pages: int
    query: int
    decode: int = 0
    alignment: int = 1


@dataclasses.dataclass(frozen=True)
class Step:
    """One step on the host: the runs of each data group, one group after the other.

    Attributes:
      tokens: [T] int32; NO_TOKEN where there is none.
      last: [B] int32 index of each run's last token; rows are numbered through all groups, unused ones take token 0.
      slots, indices: [B] int32 of each run.
      groups: a RaggedBatch for each group.
      group_starts, group_counts: [G] int32 which of the tokens are a group's.
    """

    shape: StepShape
    tokens: np.ndarray
    last: np.ndarray
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


def aligned(lengths: Sequence[int], alignment: int) -> np.ndarray:
    """Return how many tokens of a step runs of such lengths take up, each but the last rounded up."""
    sizes = np.array(lengths, np.int32)
    sizes[:-1] = -(-sizes[:-1] // alignment) * alignment
    return sizes


def table_width(needed: int, max_pages: int, page_size: int, pads: bool) -> int:
    """Return the static width of a page table for rows of up to `needed` pages.

    Args:
      pads: attention reads as far as the table is wide. Elsewhere a wide table costs its own bytes alone: of 256
        sequences with 1024 pages a MiB, sent to the devices when it has changed.
    """
    if not pads:
        return bucket(needed, max_pages, factor=8, least=max(1, 2048 // page_size))
    width = bucket(needed, max_pages, least=max(1, 512 // page_size))
    return max_pages if max_pages <= 2 * width else width


def build_step(runs: Sequence[Sequence[Run]], shape: StepShape, *, page_size: int, scratch_page: int) -> Step:
    """Pack the runs of each data group, those of decoding sequences first, into the arrays of a shape that fits them.

    Args:
      scratch_page: entry of unused places in the page tables.
    """
    sizes = {"tokens": shape.group_tokens, "rows": shape.group_rows, "pages": shape.pages, "query": shape.query}
    sizes |= {"decode": shape.decode, "alignment": shape.alignment}
    sizes |= {"page_size": page_size, "scratch_page": scratch_page}
    groups = [build_batch(group, **sizes) for group in runs]
    counts = np.array([batch.starts[-1] for batch in groups], np.int32)
    group_starts = np.cumsum(counts, dtype=np.int32) - counts
    every = [run for group in runs for run in group]
    lengths = np.array([len(run.tokens) for run in every], np.int32)
    firsts = [
        first + batch.starts[_rows(group, shape.decode)]
        for group, batch, first in zip(runs, groups, group_starts, strict=True)
    ]
    firsts = np.concatenate(firsts).astype(np.int32)
    tokens = np.full(shape.tokens, NO_TOKEN, np.int32)
    for run, first, length in zip(every, firsts, lengths, strict=True):
        tokens[first : first + length] = run.tokens
    last = np.zeros(shape.rows, np.int32)
    last[: len(every)] = firsts + lengths - 1
    slots = np.full(shape.rows, NO_SLOT, np.int32)
    slots[: len(every)] = [run.slot for run in every]
    indices = np.zeros(shape.rows, np.int32)
    indices[: len(every)] = [run.index for run in every]
    return Step(shape, tokens, last, slots, indices, groups, group_starts, counts)


def build_batch(
    runs: Sequence[Run],
    *,
    tokens: int,
    rows: int,
    pages: int,
    query: int,
    page_size: int,
    scratch_page: int,
    decode: int = 0,
    alignment: int = 1,
) -> RaggedBatch:
    """Describe the runs of one data group to its attention, in arrays of the given static sizes."""
    places = _rows(runs, decode)
    lengths = np.array([len(run.tokens) for run in runs], np.int32)
    starts = np.zeros(rows + 1, np.int32)
    behind = places >= decode
    starts[1 + places[~behind]] = lengths[~behind]
    starts[1 + places[behind]] = aligned(lengths[behind], alignment)
    starts = np.cumsum(starts, dtype=np.int32)
    starts[decode:] += max(0, decode - starts[decode])  # the fixed part's unused tokens
    before = np.array([run.start for run in runs], np.int32)
    within = _within(lengths)
    here = np.repeat(starts[places], lengths) + within
    positions = np.zeros(tokens, np.int32)
    positions[here] = np.repeat(before, lengths) + within
    batch_rows = np.full(tokens, rows, np.int32)
    batch_rows[here] = np.repeat(places, lengths)
    kv_lengths = np.zeros(rows, np.int32)
    kv_lengths[places] = before + lengths
    reserved = [run.pages[:pages] for run in runs]  # also those that later steps will fill
    counts = np.array([len(part) for part in reserved], np.int32)
    table = np.full((rows, pages), scratch_page, np.int32)
    table[np.repeat(places, counts), _within(counts)] = [page for part in reserved for page in part]
    fields = positions, batch_rows, starts, kv_lengths, table
    return RaggedBatch(*fields, max_query=query, decode=decode, alignment=alignment)


def _rows(runs: Sequence[Run], decode: int) -> np.ndarray:
    """Return the row of each run in its group: behind the first `decode` rows come those with more than one token."""
    lead = 0
    while lead < min(decode, len(runs)) and len(runs[lead].tokens) == 1:
        lead += 1
    return np.concatenate([np.arange(lead), decode + np.arange(len(runs) - lead)]).astype(np.int32)


def _within(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... up to each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


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
        fields = self.positions, self.rows, self.starts, self.lengths, table
        static = {"max_query": shape.query, "decode": shape.decode, "alignment": shape.alignment}
        return RaggedBatch(*fields, **static)

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
