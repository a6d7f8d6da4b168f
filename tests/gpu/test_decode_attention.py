"""The decode attention kernel against float64, on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.ops import RaggedBatch, paged_attention

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

H = 128
BOUND = 6e-3  # weights and results are rounded to bfloat16


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)


def describe(rng, lengths, page_size, spare=3):
    """Return a decode step of sequences of these lengths, 0 for padding, over pages in no order, and how many pages."""
    lengths = np.asarray(lengths, np.int32)
    needed = -(-lengths // page_size)
    count = int(needed.sum()) + spare + 1
    ids = iter(rng.permutation(count - 1))
    width = max(1, 4 ** int(np.ceil(np.log(max(needed.max(), 1)) / np.log(4))))
    table = np.full((len(lengths), width), count - 1, np.int32)
    for row, pages in enumerate(needed):
        table[row, :pages] = [next(ids) for _ in range(pages)]
    rows = np.where(lengths > 0, np.arange(len(lengths)), len(lengths)).astype(np.int32)
    starts = np.arange(len(lengths) + 1, dtype=np.int32)
    return RaggedBatch(np.maximum(lengths - 1, 0), rows, starts, lengths, table, max_query=1), count


def check(rng, lengths, kv_heads=4, group=5, page_size=128, score=1.0):
    """Run the kernel twice on pages that are NaN but for what is cached, and compare everything that it wrote."""
    batch, count = describe(rng, lengths, page_size)
    tokens = len(lengths)
    q = normal(rng, tokens, kv_heads, group, H) * jnp.bfloat16(score)
    k, v = normal(rng, tokens, kv_heads, H), normal(rng, tokens, kv_heads, H)
    pages = np.full((count * page_size, 2 * kv_heads, H), np.nan, jnp.bfloat16)
    slots = []  # of each sequence's positions
    for row, length in enumerate(lengths):
        position = np.arange(length)
        slots.append(batch.page_table[row, position // page_size] * page_size + position % page_size)
        pages[slots[row][:-1]] = normal(rng, max(length - 1, 0), 2 * kv_heads, H)
    expected = pages.copy()
    for row, slot in enumerate(slots):
        if len(slot):
            expected[slot[-1], ::2], expected[slot[-1], 1::2] = k[row], v[row]

    run = jax.jit(paged_attention, static_argnames="backend", donate_argnums=3)
    shape = (count, page_size, 2 * kv_heads, H)
    outs = []
    updated = jnp.asarray(pages).reshape(shape)
    for _ in range(2):  # the second launch writes the same again, and finds the counters as the first left them
        poison = jnp.full((64 << 20,), jnp.nan, jnp.bfloat16)  # where results are likely to come to lie
        poison.block_until_ready()
        del poison
        out, updated = run(q, k, v, updated, batch, backend="cuda")
        outs.append(np.asarray(out))
    written = np.asarray(updated).reshape(expected.shape)
    np.testing.assert_array_equal(written.view(np.uint16), expected.view(np.uint16))
    for out in outs:
        assert np.isfinite(out.astype(np.float32)).all()
        for row, slot in enumerate(slots):
            if not len(slot):
                np.testing.assert_array_equal(out[row].astype(np.float32), 0)
                continue
            for head in range(kv_heads):
                keys, values = (expected[slot, 2 * head + i].astype(np.float64) for i in range(2))
                scores = np.asarray(q[row, head], np.float64) @ keys.T / np.sqrt(H)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                exact = weights @ values / weights.sum(-1, keepdims=True)
                error = np.linalg.norm(out[row, head].astype(np.float64) - exact) / np.linalg.norm(exact)
                assert error < BOUND, (row, head, len(slot), error)


EDGES = [1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 449, 512]


@pytest.mark.parametrize("length", [*EDGES, 513, 4096, 4097, 32768, 100_001, 131_072])
def test_one_sequence(rng, length):
    check(rng, [length])


@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_page_edges_together(rng, page_size):
    check(rng, EDGES, page_size=page_size)


@pytest.mark.parametrize("tokens", [8, 64, 256, 300])
def test_ragged(rng, tokens):
    check(rng, rng.integers(1, 900, tokens))


@pytest.mark.parametrize("tokens", [8, 64, 256])
def test_even(rng, tokens):
    check(rng, rng.integers(280, 300, tokens))


def test_one_long_among_many_short(rng):
    lengths = rng.integers(1, 300, 64)
    lengths[17] = 60_000
    check(rng, lengths)


@pytest.mark.parametrize("lengths", [[5, 0], [700, 0, 3000, 0, 1, 0, 0, 0], [0, 0], [0, 9000, 0]])
def test_padding(rng, lengths):
    check(rng, lengths)


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 8), (1, 16), (3, 12), (8, 8), (16, 2)])
def test_heads(rng, kv_heads, group):
    check(rng, [1, 40, 5000, 333], kv_heads, group)


def test_peaked_scores(rng):
    check(rng, [20_000, 77, 1500], score=8.0)


def test_many_tokens(rng):
    check(rng, rng.integers(0, 40, 2048), kv_heads=1, page_size=16)


def test_steps_without_donation_leave_their_pages(rng):
    batch, count = describe(rng, [130], 128)
    pages = jnp.zeros((count, 128, 8, H), jnp.bfloat16)
    q, k = normal(rng, 1, 4, 5, H), normal(rng, 1, 4, H)
    _, updated = jax.jit(paged_attention, static_argnames="backend")(q, k, k, pages, batch, backend="cuda")
    assert not pages.any() and int((updated != 0).any(-1).sum()) == 8


def test_replays_of_a_graph(rng):
    """A loop of many steps in one program: each sees what those before it wrote."""
    steps, first = 40, 1000
    batch, count = describe(rng, [first + steps], 128)
    batch = jax.tree.map(jnp.asarray, batch)
    q, k, v = (normal(rng, steps, 1, 4, *rest, H) for rest in ((5,), (), ()))

    def run(pages, backend):
        def step(pages, inputs):
            index, *qkv = inputs
            position = jnp.full(1, first + index, jnp.int32)
            now = dataclasses.replace(batch, positions=position, kv_lengths=position + 1)
            out, pages = paged_attention(*qkv, pages, now, backend)
            return pages, out

        return jax.lax.scan(step, pages, (jnp.arange(steps), q, k, v))

    pages = normal(rng, count, 128, 8, H)
    (ours, out), (theirs, expected) = (jax.jit(run, static_argnums=1)(pages, name) for name in ("cuda", "xla"))
    np.testing.assert_array_equal(np.asarray(ours[:-1], np.float32), np.asarray(theirs[:-1], np.float32))
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(out - expected) / np.linalg.norm(expected) < 2 * BOUND
