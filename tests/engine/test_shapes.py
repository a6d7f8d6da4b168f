"""The shapes that steps can have are those that a warm-up compiles, no fewer and, of prompts alone, no more."""

import pytest

from ernie_jax.engine.batching import aligned
from ernie_jax.engine.scheduler import PREFILL_ROWS
from ernie_jax.engine.shapes import Shapes

CONTEXT, CHUNK = 40, 64


def prompts():
    """Yield the lengths of up to PREFILL_ROWS chunks: every count, sum and longest."""
    for runs in range(1, PREFILL_ROWS + 1):
        for longest in range(1, CONTEXT + 1):
            for total in range(longest + runs - 1, min(CHUNK, longest * runs) + 1):
                lengths, left = [longest], total - longest
                for after in range(runs - 1, 0, -1):
                    lengths.append(min(longest, left - after + 1))
                    left -= lengths[-1]
                yield lengths


@pytest.mark.parametrize(("pads", "alignment"), [(False, 1), (False, 8), (True, 1)])
def test_every_shape_is_compiled_and_can_be_reached(pads, alignment):
    shapes = Shapes(1, 4, CHUNK, 32, page_size=8, max_pages=16, pads=pads, splits=True, alignment=alignment)
    compiled = shapes.all(CONTEXT)
    assert len(compiled) == len(set(compiled))
    some = [chunks for chunks in prompts() if aligned(chunks, alignment).sum() <= CHUNK]
    alone = {shapes.choose([0], [chunks], longest) for chunks in some for longest in (max(chunks), CONTEXT)}
    beside = {
        shapes.choose([decoding], [chunks], CONTEXT)
        for chunks in some
        if aligned(chunks, alignment).sum() <= 32
        for decoding in (1, 2, 4)
    }
    decode = {shapes.choose([rows], [[]], longest) for rows in range(1, 5) for longest in range(1, CONTEXT + 1)}
    assert alone | beside | decode <= set(compiled)
    assert {shape for shape in compiled if not shape.decode} == alone | decode


@pytest.mark.parametrize("pads", [False, True])
def test_every_shape_of_two_groups_is_compiled(pads):
    shapes = Shapes(2, 4, CHUNK, 32, page_size=8, max_pages=16, pads=pads, splits=True, alignment=1)
    splits = [split for chunks in prompts() for split in ((chunks, []), (chunks[::2], chunks[1::2]))]
    alone = {shapes.choose([0, 0], split, CONTEXT) for split in splits}
    beside = {shapes.choose([1, 2], split, CONTEXT) for split in splits if sum(map(sum, split)) <= 32}
    assert alone | beside <= set(shapes.all(CONTEXT))


@pytest.mark.parametrize(("tokens", "size"), [(1024, 1024), (1025, 2048), (2048, 2048), (2049, 4096), (4097, 8000)])
def test_large_prompts_are_rounded_up_by_less(tokens, size):
    shapes = Shapes(1, 200, 8000, 2048, page_size=64, max_pages=128, pads=False, splits=True, alignment=1)
    chosen = shapes.choose([0], [[tokens]], tokens)
    assert chosen.tokens == size
    assert chosen in shapes.all(8000)


@pytest.mark.parametrize(("sequences", "size"), [(64, 64), (65, 128), (128, 128), (129, 200)])
def test_many_sequences_are_rounded_up_by_less(sequences, size):
    shapes = Shapes(1, 200, 8000, 2048, page_size=64, max_pages=128, pads=False, splits=True, alignment=1)
    chosen = shapes.choose([sequences], [[]], 300)
    assert (chosen.tokens, chosen.rows) == (size, size)
    assert chosen in shapes.all(300)
