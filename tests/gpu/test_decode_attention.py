"""The decode attention kernel against float64, on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.ops import paged_attention
from tests.kernels.cases import BOUND, EDGES, H, check_decode, describe, distance, normal

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize("length", [*EDGES, 513, 4096, 4097, 32768, 100_001, 131_072])
def test_one_sequence(rng, length):
    check_decode(rng, [length])


@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_page_edges_together(rng, page_size):
    check_decode(rng, EDGES, page_size=page_size)


@pytest.mark.parametrize("kv_dtype", [jnp.int8, jnp.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("lengths", [EDGES, [131_072], [300, 0, 70_000, 1] * 16], ids=["edges", "long", "uneven"])
def test_pages_in_8_bits(rng, lengths, kv_dtype):
    check_decode(rng, lengths, kv_dtype=kv_dtype)


@pytest.mark.parametrize("tokens", [8, 64, 256, 300])
def test_ragged(rng, tokens):
    check_decode(rng, rng.integers(1, 900, tokens))


@pytest.mark.parametrize("tokens", [8, 64, 256])
def test_even(rng, tokens):
    check_decode(rng, rng.integers(280, 300, tokens))


def test_one_long_among_many_short(rng):
    lengths = rng.integers(1, 300, 64)
    lengths[17] = 60_000
    check_decode(rng, lengths)


@pytest.mark.parametrize("lengths", [[5, 0], [700, 0, 3000, 0, 1, 0, 0, 0], [0, 0], [0, 9000, 0]])
def test_padding(rng, lengths):
    check_decode(rng, lengths)


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 8), (1, 16), (3, 12), (8, 8), (16, 2)])
def test_heads(rng, kv_heads, group):
    check_decode(rng, [1, 40, 5000, 333], kv_heads, group)


def test_peaked_scores(rng):
    check_decode(rng, [20_000, 77, 1500], score=8.0)


def test_many_tokens(rng):
    check_decode(rng, rng.integers(0, 40, 2048), kv_heads=1, page_size=16)


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
    assert distance(out, expected) < 2 * BOUND
