"""The few static shapes of a step: each is a program to compile."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from ernie_jax.engine.batching import StepShape, aligned, bucket, table_width
from ernie_jax.engine.scheduler import PREFILL_ROWS

_LEAST_PREFILL = 16
_LEAST_MIXED = 16  # decoding sequences that a mixed step has room for
_FEW = 8  # by what a mixed step is smaller if its chunks are
# From so many sequences, and tokens of prompts, on unused rows cost: on an H100 a decode step of 256 with 128 in it is
# 5 % slower than one of 128, and dense products of 2,048 tokens among 4,096 take half as long again.
_MANY_ROWS, _MANY_TOKENS = 64, 1024


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Choose a step's shape by what it holds.

    Sizes are rounded up by factors of 4, large ones by 2, in mixed steps by more: beside a chunk, unused rows cost
    little.

    Attributes:
      groups: number of data groups.
      max_pages: of the longest sequence.
      pads: attention pads chunks to the shape's longest and tables to their width, so that several sizes of these pay.
      splits: the decoding part of a mixed step has a fixed size, as attention backends need that compute it apart.
      alignment: chunks begin at multiples of so many tokens, as attention backends need that copy groups of them.
    """

    groups: int
    max_sequences: int
    prefill_chunk: int
    mixed_chunk: int
    page_size: int
    max_pages: int
    pads: bool
    splits: bool
    alignment: int

    def choose(self, decode: Sequence[int], chunks: Sequence[Sequence[int]], longest: int) -> StepShape:
        """Return the shape for so many decoding sequences and chunks of such lengths in each data group.

        Args:
          longest: tokens of the longest sequence, those of this step included.
        """
        pages = self._width(longest)
        most, total = max(decode), sum(decode)
        lengths = [length for group in chunks for length in group]
        if not lengths:
            rows = decode_rows(total, self.max_sequences)
            return self._decode(rows, self._share(rows, most), pages)
        sizes = [int(aligned(group, self.alignment).sum()) for group in chunks]
        tokens, runs = max(sizes), max(map(len, chunks))
        if not total:
            size = prefill_tokens(sum(sizes), self.prefill_chunk)
            return self._prefill(size, self._share(size, tokens), len(lengths) > 1, max(lengths), pages)
        few = self._few(self.mixed_chunk)
        size = few if sum(sizes) <= few else self.mixed_chunk
        return self._mixed(self._lead(most), size, self._share(size, tokens), runs > 1, max(lengths), pages)

    def all(self, context: int) -> list[StepShape]:
        """Return the shapes of steps of sequences of up to `context` tokens."""
        widths = list(dict.fromkeys(map(self._width, range(1, context + 1, self.page_size))))
        return list(dict.fromkeys(shape for pages in widths for shape in self._of_width(pages)))

    def _of_width(self, pages: int) -> Iterator[StepShape]:
        cached = pages * self.page_size
        for rows in _sizes(decode_rows, self.max_sequences):
            for share in self._shares(rows):
                yield self._decode(rows, share, pages)
        before = 0
        for size in _sizes(prefill_tokens, self.prefill_chunk):
            for share, several in itertools.product(self._shares(size), (False, True) if self.pads else (True,)):
                runs = self.groups * PREFILL_ROWS if several else 1
                # More than `before` tokens in so many runs, of which none is longer than a sequence.
                for longest in _sizes(_query, min(share, cached), first=before // runs + 1):
                    yield self._prefill(size, share, several, longest, pages)
            before = size
        leads = dict.fromkeys(map(self._lead, range(1, self.max_sequences + 1)))
        for lead, size in itertools.product(leads, (self._few(self.mixed_chunk), self.mixed_chunk)):
            for share in self._shares(size):
                for several, longest in ((False, size), (True, size), (True, 1)):
                    yield self._mixed(lead, size, share, several, longest, pages)

    def _decode(self, rows: int, group_rows: int, pages: int) -> StepShape:
        return StepShape(rows, rows, group_rows, group_rows, pages, query=1)

    def _prefill(self, tokens: int, group_tokens: int, several: bool, longest: int, pages: int) -> StepShape:
        several = several or not self.pads  # unused rows cost little then
        group_rows = PREFILL_ROWS if several else 1
        rows = self.groups * PREFILL_ROWS if several else 1
        query = _query(longest, group_tokens) if several and self.pads else group_tokens
        return StepShape(tokens, rows, group_tokens, group_rows, pages, query, alignment=self.alignment)

    def _mixed(self, lead: int, tokens: int, group_tokens: int, several: bool, longest: int, pages: int) -> StepShape:
        rows, query, few = lead + PREFILL_ROWS, group_tokens, self._few(group_tokens)
        if self.pads and not several:
            rows = lead + 1
        elif self.pads and longest <= few:
            query = few
        total = self.groups * lead + tokens
        decode = lead if self.splits else 0
        group = lead + group_tokens
        return StepShape(total, self.groups * rows, group, rows, pages, query, decode, self.alignment)

    def _width(self, longest: int) -> int:
        return table_width(-(-longest // self.page_size), self.max_pages, self.page_size, self.pads)

    def _lead(self, rows: int) -> int:
        return bucket(rows, self.max_sequences, factor=16, least=_LEAST_MIXED)

    def _few(self, tokens: int) -> int:
        return max(1, tokens // _FEW)

    def _share(self, total: int, most: int) -> int:
        """Return how much of a static size a group gets: an even share if that is enough for all, else the whole."""
        even = self._shares(total)[0]
        return even if most <= even else total

    def _shares(self, total: int) -> list[int]:
        return list(dict.fromkeys((-(-total // self.groups), total)))


def decode_rows(sequences: int, most: int) -> int:
    """Return the static size of a decode step of so many sequences, of an engine that takes `most`."""
    return _rounded_up(sequences, most, least=1, many=_MANY_ROWS)


def prefill_tokens(tokens: int, most: int) -> int:
    """Return the static size of a step of so many prompt tokens, of an engine that takes `most` in one."""
    return _rounded_up(tokens, most, least=_LEAST_PREFILL, many=_MANY_TOKENS)


def _rounded_up(count: int, most: int, least: int, many: int) -> int:
    return bucket(count, most, least=least) if count <= many else bucket(count, most, factor=2, least=many)


def _query(longest: int, most: int) -> int:
    """Return the static length of a step's longest chunk."""
    return bucket(longest, most, factor=8)


def _sizes(size_of: Callable[[int, int], int], most: int, first: int = 1) -> list[int]:
    return list(dict.fromkeys(size_of(count, most) for count in range(first, most + 1)))
