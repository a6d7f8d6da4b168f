"""The decode attention kernel against float64, in the emulator."""

import jax
import jax.numpy as jnp
import pytest

from ernie_jax.ops import decode_attention, paged_attention
from tests.kernels import cases
from tests.ops import test_attention as ops

SMALL = ops.SMALL
pytestmark = pytest.mark.usefixtures("emulator")


@pytest.mark.parametrize("length", [1, 17, 257, 1000])
def test_one_sequence(rng, length):
    cases.check_decode(rng, [length], kv_heads=2)


@pytest.mark.parametrize("page_size", [16, 48])
def test_page_edges_together(rng, page_size):
    cases.check_decode(rng, cases.EDGES, kv_heads=1, page_size=page_size)


def test_one_long_among_many_short(rng):
    lengths = rng.integers(1, 40, 20)
    lengths[7] = 2000
    cases.check_decode(rng, lengths, kv_heads=1)


@pytest.mark.parametrize("lengths", [[5, 0], [300, 0, 700, 0, 1, 0, 0, 0], [0, 0]])
def test_padding(rng, lengths):
    cases.check_decode(rng, lengths, kv_heads=2)


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 8), (1, 16), (3, 12), (8, 2)])
def test_heads(rng, kv_heads, group):
    cases.check_decode(rng, [1, 40, 600], kv_heads, group)


def test_more_tokens_than_a_call_takes(rng, monkeypatch):
    monkeypatch.setattr(decode_attention, "_MOST_TOKENS", 3)
    cases.check_decode(rng, [40, 1, 300, 7, 90, 18, 2], kv_heads=1)


def test_peaked_scores(rng):
    cases.check_decode(rng, [1200, 77], kv_heads=1, score=8.0)


def test_many_tokens(rng):
    cases.check_decode(rng, rng.integers(0, 20, 300), kv_heads=1, page_size=16)


@SMALL
@pytest.mark.parametrize(
    "case",
    [
        {"lengths": [1, 17, 257, 1000], "kv_heads": 2},
        {"lengths": cases.EDGES, "kv_heads": 1, "page_size": 48},
        {"lengths": [300, 0, 1, 0], "kv_heads": 3, "group": 12},
        {"lengths": [40] * 150, "kv_heads": 1, "page_size": 16},
        {"lengths": [1, 1], "kv_heads": 4, "spread": True},
    ],
    ids=["lengths", "page edges", "two tiles of queries", "many tokens", "large and small"],
)
def test_pages_in_8_bits(case, kv_dtype, rng):
    cases.check_decode(rng, **case, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", [None, jnp.int8])
def test_beside_prompts(rng, kv_dtype, monkeypatch):
    """In a mixed step the kernel takes the decoding part, two of whose rows are unused."""
    monkeypatch.setattr(ops, "H", 128)
    monkeypatch.setattr(ops, "PAGE", 16)
    mixture = [(30, 1), (90, 1), (13, 9), (0, 17)]
    run = jax.jit(lambda *arguments: paged_attention(*arguments, "cuda"))
    ops.check(mixture, jnp.bfloat16, 1e-2, rng, run, decode=4, kv_dtype=kv_dtype)
