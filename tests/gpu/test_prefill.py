"""Experts and attention of many tokens against float64, on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.kernels import capability
from ernie_jax.ops import RaggedBatch, grouped_mlp
from ernie_jax.ops.prefill_attention import prefill
from tests.kernels.cases import BOUND, distance, experts_reference

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    pytest.mark.skipif(capability() != "9.0", reason="needs a Hopper GPU"),
]

@pytest.mark.parametrize("routing", ["even", "one expert", "padded"])
@pytest.mark.parametrize("tokens", [1, 130, 1000])
def test_experts(tokens, routing, rng):
    count, k, inner, width = 8, 3, 512, 768
    x, gate_up, down = (
        jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)
        for shape, scale in (
            ((tokens, width), 1),
            ((count, 2, inner, width), width**-0.5),
            ((count, width, inner), inner**-0.5),
        )
    )
    chosen = np.argsort(rng.random((tokens, count)), axis=1)[:, :k].astype(np.int32)
    if routing == "one expert":
        chosen[:, 0], chosen[:, 1:] = 5, rng.choice([-1, count])
    if routing == "padded":
        chosen[tokens // 2 + 1 :] = 1000
    weights = jnp.asarray(rng.dirichlet(np.ones(k), size=tokens), jnp.bfloat16)
    run = jax.jit(functools.partial(grouped_mlp, backend="mosaic"))
    expected = experts_reference(x, chosen, weights, gate_up, down)
    assert distance(run(x, chosen, weights, gate_up, down), expected) < BOUND
    shards = [run(x, chosen, weights, gate_up[a : a + 4], down[a : a + 4], first_expert=a) for a in (0, 4)]
    assert distance(sum(np.asarray(shard, np.float64) for shard in shards), expected) < BOUND


# (cached before, new tokens) of each sequence, and padding tokens.
STEPS = [
    ([(0, 1)], 7),
    ([(0, 300)], 0),
    ([(77, 500)], 200),
    ([(0, 129), (640, 1), (1000, 128), (5, 2)], 0),
    ([(13, 9), (2000, 400), (0, 700)], 300),
]


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize(("runs", "padding"), STEPS)
def test_attention(runs, padding, page_size, rng):
    kv_heads, group, head_dim = 2, 5, 128
    news, ends = np.array([new for _, new in runs]), np.array([sum(run) for run in runs])
    width, rows = -(-ends.max() // page_size) + 1, len(runs) + (len(runs) > 1)  # one row may be unused
    table = np.full((rows, width), rows * width)
    table[: len(runs)] = rng.permutation(rows * width)[: len(runs) * width].reshape(len(runs), width)
    total = news.sum() + padding
    positions, row = np.zeros(total, np.int32), np.full(total, rows, np.int32)
    positions[: news.sum()] = np.concatenate([np.arange(end - new, end) for new, end in zip(news, ends, strict=True)])
    row[: news.sum()] = np.repeat(np.arange(len(runs)), news)
    starts, lengths = np.full(rows + 1, news.sum()), np.zeros(rows, int)
    starts[: len(runs)], lengths[: len(runs)] = np.cumsum(news) - news, ends
    arrays = (jnp.asarray(a, jnp.int32) for a in (positions, row, starts, lengths, table))
    batch = RaggedBatch(*arrays, max_query=int(total if len(runs) == 1 else news.max()))
    pages = jnp.asarray(rng.normal(size=(rows * width + 1, page_size, 2 * kv_heads, head_dim)), jnp.bfloat16)
    q = jnp.asarray(rng.normal(size=(total, kv_heads, group, head_dim)), jnp.bfloat16)
    out = np.asarray(jax.jit(prefill)(q, pages, batch), np.float64)
    assert np.isfinite(out).all()
    wide, pages = np.asarray(q, np.float64), np.asarray(pages, np.float64)
    for index, (cached, new) in enumerate(runs):
        here = slice(starts[index], starts[index] + new)
        k, v = np.moveaxis(pages[table[index]].reshape(-1, kv_heads, 2, head_dim)[: cached + new], 2, 0)
        scores = np.einsum("qkrh,skh->krqs", wide[here], k) * head_dim**-0.5
        scores = np.where(np.arange(cached + new) <= cached + np.arange(new)[:, None], scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("krqs,skh->qkrh", scores / scores.sum(-1, keepdims=True), v)
        assert distance(out[here], expected) < BOUND
