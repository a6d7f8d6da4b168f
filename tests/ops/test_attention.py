"""Attention over pages and over packed sequences, against a float64 reference on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.engine.batching import Run, build_batch
from ernie_jax.ops import attention, packed_attention, paged_attention

K, R, H, PAGE = 2, 3, 16, 8


def reference(q, k, v, visible):
    """Attend q [Tq, K, R, H] over k, v [Tk, K, H] where visible [Tq, Tk]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("qkrh,skh->krqs", q, k) / np.sqrt(H)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("krqs,skh->qkrh", weights / weights.sum(-1, keepdims=True), v)


def heads(rng, tokens, dtype):
    shapes = ((tokens, K, R, H), (tokens, K, H), (tokens, K, H))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


# A prefill chunk that continues, a decode step, a fresh prompt, a long decode: (cached before, new tokens).
MIXTURE = [(13, 9), (30, 1), (0, 17), (90, 1)]


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("block", [16, 2048], ids=["many blocks", "one block"])
@pytest.mark.parametrize("mixture", [MIXTURE, [(90, 1), (3, 1), (50, 1)], [(40, 33)]], ids=["mixed", "decode", "chunk"])
def test_paged_attention_matches_float64(mixture, block, dtype, bound, rng, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    num_pages = 64
    order = rng.permutation(num_pages - 1).tolist()  # pages in no order; the last page is scratch
    pages = np.asarray(rng.normal(size=(num_pages, PAGE, 2 * K, H)), np.float32)  # stale content everywhere
    histories, runs = [], []
    for cached, new in mixture:
        mine = [order.pop() for _ in range(-(-(cached + new) // PAGE))]
        k, v = heads(rng, cached, dtype)[1:]
        for position in range(cached):
            pages[mine[position // PAGE], position % PAGE] = np.stack([k[position], v[position]], 1).reshape(2 * K, H)
        histories.append((k, v))
        runs.append(Run([0] * new, cached, mine))
    total = sum(new for _, new in mixture)
    batch = build_batch(runs, tokens=total + 5, rows=len(runs) + 2, page_size=PAGE, max_pages=16, scratch_page=63)
    q, k, v = heads(rng, total + 5, dtype)
    out, written = jax.jit(paged_attention)(q, k, v, jnp.asarray(pages, dtype), batch)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    first = 0
    for (cached, new), (old_k, old_v), run in zip(mixture, histories, runs, strict=True):
        here = slice(first, first + new)
        all_k, all_v = (np.concatenate([a, b[here]]) for a, b in ((old_k, k), (old_v, v)))
        visible = np.arange(cached + new) <= (cached + np.arange(new))[:, None]
        expected = reference(q[here], all_k, all_v, visible)
        error = np.linalg.norm(np.asarray(out[here], np.float64) - expected) / np.linalg.norm(expected)
        assert error < bound
        stored = np.asarray(written)[run.pages].reshape(-1, K, 2, H)[: cached + new]
        np.testing.assert_array_equal(stored[:, :, 0], all_k)
        np.testing.assert_array_equal(stored[:, :, 1], all_v)
        first += new
    used = {page for run in runs for page in run.pages}
    others = [page for page in range(num_pages - 1) if page not in used]
    np.testing.assert_array_equal(np.asarray(written)[others], np.asarray(jnp.asarray(pages[others], dtype)))


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_packed_attention_matches_float64(dtype, bound, rng):
    segments = np.array([[0] * 7 + [1] * 12 + [2], [4] * 20])
    q, k, v = (jnp.stack(pair) for pair in zip(heads(rng, 20, dtype), heads(rng, 20, dtype), strict=True))
    out = np.asarray(packed_attention(q, k, v, jnp.asarray(segments)), np.float64)
    for row in range(2):
        visible = np.tri(20, dtype=bool) & (segments[row][:, None] == segments[row])
        expected = reference(q[row], k[row], v[row], visible)
        assert np.linalg.norm(out[row] - expected) / np.linalg.norm(expected) < bound
