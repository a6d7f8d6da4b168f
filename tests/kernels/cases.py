"""Inputs and float64 references of our kernels, for the tests on a GPU and for those in the emulator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.engine.batching import aligned
from ernie_jax.ops import (
    Adapted,
    RaggedBatch,
    dequantize,
    grouped_mlp,
    linear,
    norm_and_route,
    paged_attention,
    quantize,
    route,
)
from ernie_jax.ops.pages import ScaledPages
from tests.ops.test_attention import stored, worth

BOUND = 6e-3  # bfloat16 in and out, hidden values and attention's weights rounded as well
H = 128
NORM_MIN = 1e-12


def distance(out, expected) -> float:
    """Return the relative error of all of `out` together."""
    out = np.asarray(out, np.float64)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


def normal(rng, *shape, scale=1.0) -> jax.Array:
    """Return bfloat16 numbers."""
    return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(scale), jnp.bfloat16)


# Products and experts.


def rounded(weight, form=None):
    """Return a weight [*out, in] in a form, or as it is, and what that stands for in float64."""
    if form is None:
        return weight, np.asarray(weight, np.float64)
    weight = quantize(np.asarray(weight, np.float32), weight.ndim - 1, form)
    return jax.tree.map(jnp.asarray, weight), np.asarray(dequantize(weight), np.float64)


def check_linear(rng, tokens, inner, outer, form=None, backend="cuda", bound=BOUND):
    """Hold x weight^T to float64."""
    x = normal(rng, tokens, inner)
    weight, wide = rounded(normal(rng, outer, inner, scale=inner**-0.5), form)
    out = jax.jit(functools.partial(linear, "td,od->to", backend=backend))(x, weight)
    assert distance(out, np.asarray(x, np.float64) @ wide.T) < bound


def experts_reference(x, chosen, weights, gate_up, down, first=0) -> np.ndarray:
    """Return what experts `first` and following add to each token, in float64."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    out = np.zeros_like(x)
    for e in range(len(gate_up)):
        token, slot = np.nonzero(np.asarray(chosen) == e + first)
        if len(token):
            gate, up = np.moveaxis(np.einsum("xfd,td->txf", np.asarray(gate_up[e], np.float64), x[token]), 1, 0)
            rows = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(down[e], np.float64).T
            np.add.at(out, token, rows * weights[token, slot, None])
    return out


def draw_experts(rng, tokens, k, experts, inner, width, skew=False):
    """Return what `grouped_mlp` takes; with `skew` all tokens choose the same experts."""
    x = normal(rng, tokens, width)
    if skew:
        chosen = np.tile(rng.permutation(experts)[:k], (tokens, 1)).astype(np.int32)
    else:
        chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    weights = jnp.asarray(rng.dirichlet(np.ones(k), size=tokens), jnp.bfloat16)
    gate_up = normal(rng, experts, 2, inner, width, scale=width**-0.5)
    return x, jnp.asarray(chosen), weights, gate_up, normal(rng, experts, width, inner, scale=inner**-0.5)


_grouped_mlp = jax.jit(grouped_mlp, static_argnums=5)


def check_experts(rng, tokens, k, experts, inner, width, skew=False, form=None, backend="cuda", bound=BOUND):
    """Hold the experts' sum to float64."""
    *inputs, gate_up, down = draw_experts(rng, tokens, k, experts, inner, width, skew)
    weights, wide = zip(rounded(gate_up, form), rounded(down, form), strict=True)
    assert distance(_grouped_mlp(*inputs, *weights, backend), experts_reference(*inputs, *wide)) < bound


def check_shared_experts(rng, tokens, k, experts, inner, width, form=None, backend="cuda"):
    """Hold the experts' sum with that of shared ones, twice as wide, to float64."""
    *inputs, gate_up, down = draw_experts(rng, tokens, k, experts, inner, width)
    shared = (
        normal(rng, 2, 2 * inner, width, scale=width**-0.5),
        normal(rng, width, 2 * inner, scale=(2 * inner) ** -0.5),
    )
    pairs = (rounded(weight, form) for weight in (gate_up, down, *shared))
    (gate_up, down, *shared), wide = zip(*pairs, strict=True)
    out = _grouped_mlp(*inputs, gate_up, down, backend, 0, tuple(shared))
    ones = jnp.zeros((tokens, 1), jnp.int32), np.ones((tokens, 1))
    everyone = experts_reference(inputs[0], *ones, wide[2][None], wide[3][None])
    assert distance(out, experts_reference(*inputs, *wide[:2]) + everyone) < BOUND


def check_shards(rng, tokens, k, experts, inner, width):
    """Hold each half of the experts to float64, of tokens some of whose pairs are padding."""
    x, chosen, weights, gate_up, down = draw_experts(rng, tokens, k, experts, inner, width)
    chosen = np.array(chosen)
    chosen[tokens // 2 :, 2:] = 2 * experts  # padding, or somebody else's
    for first in (0, experts // 2):
        part = slice(first, first + experts // 2)
        out = _grouped_mlp(x, chosen, weights, gate_up[part], down[part], "cuda", jnp.int32(first))
        expected = experts_reference(x, chosen, weights, gate_up[part], down[part], first)
        assert np.isfinite(np.asarray(out, np.float64)).all()
        assert np.abs(np.asarray(out, np.float64) - expected).max() < 0.05


# The router.


def draw_router(rng, tokens, width=2560, experts=64, bias=True):
    """Return x, router weight and correction bias."""
    x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(experts, width)) * width**-0.5, jnp.float32)
    offsets = rng.uniform(20, 63) + rng.normal(size=experts) * 0.01 if bias else np.zeros(experts)
    return x, weight, jnp.asarray(offsets, jnp.float32)


def check_routing(x, weight, bias, k, experts, weights, probabilities):
    """Hold a routing of x to float64; ids may differ where scores are nearly equal."""
    x, weight, bias = (np.asarray(a, np.float64) for a in (x, weight, bias))
    logits = x @ weight.T
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-9)
    experts, scores = np.asarray(experts), expected + bias
    assert ((experts >= 0) & (experts < len(weight))).all()
    assert all(len(set(row)) == k for row in experts)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    different = experts != best
    mine, theirs = (np.take_along_axis(scores, ids, axis=1) for ids in (experts, best))
    assert (np.abs(mine - theirs)[different] < 1e-5).all()
    chosen = np.take_along_axis(expected, experts, axis=1)
    assert weights.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(weights, np.float64), chosen / chosen.sum(1, keepdims=True), rtol=2**-8)


def run_route(inputs, k=6, norm_min=NORM_MIN, backend="cuda"):
    """Route in a program of its own."""
    return jax.jit(route, static_argnums=(3, 4, 5))(*inputs, k, norm_min, backend)


def check_norm_and_routing(rng, tokens, width=2560, experts=64, k=6):
    """Hold the norm to float64, and the routing of what it gives."""
    x, weight, bias = draw_router(rng, tokens, width, experts)
    norm = jnp.asarray(1 + rng.normal(size=width) / 8, jnp.bfloat16)
    run = jax.jit(norm_and_route, static_argnums=(2, 5, 6, 7))
    h, *routing = run(x, norm, 1e-5, weight, bias, k, NORM_MIN, "cuda")
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt(np.mean(wide * wide, axis=1, keepdims=True) + 1e-5) * np.asarray(norm, np.float64)
    np.testing.assert_allclose(np.asarray(h, np.float64), expected, rtol=2**-7)  # rounded twice
    check_routing(h, weight, bias, k, *routing)


def check_equals(tokens, width=2560):
    """Of experts with equal scores the lower ids are chosen."""
    inputs = jnp.ones((tokens, width), jnp.bfloat16), jnp.zeros((64, width)), jnp.zeros(64).at[40].set(1)
    experts, weights, _ = route(*inputs, 6, NORM_MIN, "cuda")
    np.testing.assert_array_equal(experts, np.tile([40, 0, 1, 2, 3, 4], (tokens, 1)))
    np.testing.assert_allclose(np.asarray(weights, np.float64), 1 / 6, rtol=2**-8)


def check_norm_min(rng, width=2560):
    """What a token's probabilities are divided by is at least norm_min."""
    experts, weights, probabilities = run_route(draw_router(rng, 3, width), norm_min=4.0)
    expected = np.take_along_axis(np.asarray(probabilities), np.asarray(experts), axis=1) / 4
    np.testing.assert_allclose(np.asarray(weights, np.float64), expected, rtol=2**-8)


# Decode attention.

EDGES = [1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 449, 512]


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


def check_decode(rng, lengths, kv_heads=4, group=5, page_size=128, score=1.0, kv_dtype=jnp.bfloat16, spread=False):
    """Run the kernel twice on pages that are NaN but for what is cached, and compare everything that it wrote."""
    batch, count = describe(rng, lengths, page_size)
    tokens = len(lengths)
    q = normal(rng, tokens, kv_heads, group, H) * jnp.bfloat16(score)
    k, v = normal(rng, tokens, kv_heads, H), normal(rng, tokens, kv_heads, H)
    if spread:  # to what fp8 has no number for
        v *= jnp.exp2(jnp.asarray(rng.integers(-12, 12, v.shape), v.dtype))
    shape = count * page_size, 2 * kv_heads, H
    pages = np.full(shape, 99, np.int8) if kv_dtype == jnp.int8 else np.full(shape, np.nan, kv_dtype)
    scales = np.full(shape[:2], np.nan, np.float32)
    slots = []  # of each sequence's positions
    for row, length in enumerate(lengths):
        position = np.arange(length)
        slots.append(batch.page_table[row, position // page_size] * page_size + position % page_size)
        old = stored(normal(rng, max(length - 1, 0), 2 * kv_heads, H), kv_dtype)
        pages[slots[row][:-1]], scales[slots[row][:-1]] = old
    expected, expected_scales = pages.copy(), scales.copy()
    for row, slot in enumerate(slots):
        if len(slot):
            new = stored(np.stack([k[row], v[row]], 1).reshape(2 * kv_heads, H), kv_dtype)
            expected[slot[-1]], expected_scales[slot[-1]] = new

    run = jax.jit(paged_attention, static_argnames="backend", donate_argnums=3)
    outs = []
    updated = jnp.asarray(pages).reshape(count, page_size, 2 * kv_heads, H)
    if kv_dtype == jnp.int8:
        updated = ScaledPages(updated, jnp.asarray(scales.reshape(count, page_size, -1).swapaxes(1, 2)))
    for _ in range(2):  # the second launch writes the same again, and finds the counters as the first left them
        if jax.default_backend() == "gpu":  # poison where results are likely to come to lie; the emulator does so
            jnp.full((64 << 20,), jnp.nan, jnp.bfloat16).block_until_ready()
        out, updated = run(q, k, v, updated, batch, backend="cuda")
        outs.append(np.asarray(out))
    if kv_dtype == jnp.int8:
        written = np.asarray(updated.scales).swapaxes(1, 2).reshape(expected_scales.shape)
        np.testing.assert_array_equal(written, expected_scales)
        updated = updated.values
    written, bits = np.asarray(updated).reshape(expected.shape), f"u{jnp.dtype(kv_dtype).itemsize}"
    np.testing.assert_array_equal(written.view(bits), expected.view(bits))
    for out in outs:
        assert np.isfinite(out.astype(np.float32)).all()
        for row, slot in enumerate(slots):
            if not len(slot):
                np.testing.assert_array_equal(out[row].astype(np.float32), 0)
                continue
            for head in range(kv_heads):
                keys, values = (
                    worth(expected[slot, 2 * head + i], expected_scales[slot, 2 * head + i]) for i in range(2)
                )
                scores = np.asarray(q[row, head], np.float64) @ keys.T / np.sqrt(H)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                exact = weights @ values / weights.sum(-1, keepdims=True)
                error = distance(out[row, head], exact)
                assert error < BOUND, (row, head, len(slot), error)


def check_prefill(rng, run, runs, padding, page_size, kv_heads, group, kv_dtype=jnp.bfloat16, spare=0):
    """Hold run(q, pages, batch) to float64, for (cached before, new tokens) of each sequence and padding tokens.

    Sequences begin at multiples of 8 tokens.
    """
    news, ends = np.array([new for _, new in runs]), np.array([sum(run) for run in runs])
    width, rows = -(-ends.max() // page_size) + 1, len(runs) + (len(runs) > 1)  # one row may be unused
    table = np.full((rows, width), rows * width)
    table[: len(runs)] = rng.permutation(rows * width)[: len(runs) * width].reshape(len(runs), width)
    taken = aligned(news, 8)
    total = taken.sum() + padding
    positions, row = np.zeros(total, np.int32), np.full(total, rows, np.int32)
    starts, lengths = np.full(rows + 1, taken.sum()), np.zeros(rows, int)
    starts[: len(runs)], lengths[: len(runs)] = np.cumsum(taken) - taken, ends
    for index, (start, new, end) in enumerate(zip(starts, news, ends, strict=False)):
        positions[start : start + new], row[start : start + new] = np.arange(end - new, end), index
    arrays = (jnp.asarray(a, jnp.int32) for a in (positions, row, starts, lengths, table))
    batch = RaggedBatch(*arrays, max_query=int(total if len(runs) == 1 else news.max()), alignment=8)
    values, scales = stored(normal(rng, rows * width + 1 + spare, page_size, 2 * kv_heads, H), kv_dtype)
    pages = jnp.asarray(values)
    if kv_dtype == jnp.int8:
        pages = ScaledPages(pages, jnp.asarray(scales.swapaxes(1, 2)))
    q = normal(rng, total, kv_heads, group, H)
    out = np.asarray(run(q, pages, batch), np.float64)
    assert np.isfinite(out).all()
    wide, pages = np.asarray(q, np.float64), worth(values, scales)
    for index, (cached, new) in enumerate(runs):
        if not new:
            continue
        here = slice(starts[index], starts[index] + new)
        k, v = np.moveaxis(pages[table[index]].reshape(-1, kv_heads, 2, H)[: cached + new], 2, 0)
        scores = np.einsum("qkrh,skh->krqs", wide[here], k) * H**-0.5
        scores = np.where(np.arange(cached + new) <= cached + np.arange(new)[:, None], scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("krqs,skh->qkrh", scores / scores.sum(-1, keepdims=True), v)
        assert distance(out[here], expected) < BOUND


def check_packed(rng, attend, documents, kv_heads, group):
    """Hold attend(q, k, v, segments) and its gradient to float64, for rows of documents of these lengths."""
    rows, length = len(documents), sum(documents[0])
    segments = np.stack([np.repeat(np.arange(len(row)), row) for row in documents]).astype(np.int32)
    q, pull = (normal(rng, rows, length, kv_heads, group, H) for _ in range(2))
    k, v = (normal(rng, rows, length, kv_heads, H) for _ in range(2))
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, jnp.asarray(segments)), q, k, v)
    found = out, *back(pull)
    q, k, v, pull = (np.asarray(x, np.float64) for x in (q, k, v, pull))
    visible = np.tri(length, dtype=bool) & (segments[:, :, None] == segments[:, None])
    scores = np.einsum("bqkrh,bskh->bkrqs", q, k) * H**-0.5
    weights = np.where(visible[:, None, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    of_weights = np.einsum("bqkrh,bskh->bkrqs", pull, v)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True)) * H**-0.5
    expected = (
        np.einsum("bkrqs,bskh->bqkrh", weights, v),
        np.einsum("bkrqs,bskh->bqkrh", of_scores, k),
        np.einsum("bkrqs,bqkrh->bskh", of_scores, q),
        np.einsum("bkrqs,bqkrh->bskh", weights, pull),
    )
    for name, one, exact in zip(("out", "q", "k", "v"), found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert distance(one, exact) < BOUND, name


def check_trained_experts(rng, tokens, k, experts, width, inner, learns=True, some=None, rank=0):
    """Hold experts' backend "mosaic" and its gradient to float64; `some` names those experts that are there.

    With a rank adapters learn, and the weights beside them do not.
    """
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    chosen[: 2 * tokens // 3, 0] = 1  # of 200 tokens more than one block of rows
    chosen[tokens - 3 :] = -1
    first, count = some or (0, experts)
    weights = jnp.asarray(rng.dirichlet(np.ones(k), size=tokens), jnp.bfloat16)
    x, pull = (normal(rng, tokens, width) for _ in range(2))
    gate_up = normal(rng, count, 2, inner, width, scale=width**-0.5)
    down = normal(rng, count, width, inner, scale=inner**-0.5)
    pairs = []
    if rank:
        for *out, into in (gate_up.shape, down.shape):
            pairs.append((normal(rng, count, rank, into, scale=into**-0.5), normal(rng, *out, rank, scale=rank**-0.5)))

    def run(x, weights, *parts):
        both = parts if learns else (gate_up, down)
        if rank:
            both = [Adapted(w, *parts[i : i + 2]) for w, i in ((gate_up, 0), (down, 2))]
        return grouped_mlp(x, jnp.asarray(chosen), weights, *both, "mosaic", first_expert=first)

    learnt = [part for pair in pairs for part in pair] if rank else [gate_up, down] if learns else []
    out, back = jax.vjp(run, x, weights, *learnt)
    found = out, *back(pull)
    x, weights, gate_up, down, pull = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down, pull))
    pairs = [[np.asarray(part, np.float64) for part in pair] for pair in pairs]
    if rank:
        gate_up, down = (
            weight + np.einsum("e...r,erd->e...d", b, a) for weight, (a, b) in zip((gate_up, down), pairs, strict=True)
        )
    expected = [np.zeros_like(x), *(np.zeros_like(a) for a in (x, weights, gate_up, down))]
    out, of_x, of_weights, of_gate_up, of_down = expected
    for t, slot in np.ndindex(chosen.shape):
        e = chosen[t, slot] - first
        if not 0 <= e < count or chosen[t, slot] < 0:
            continue
        gate, up = gate_up[e] @ x[t]
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up
        of_hidden = down[e].T @ pull[t]
        out[t] += weights[t, slot] * (down[e] @ hidden)
        of_weights[t, slot] += hidden @ of_hidden
        of_hidden *= weights[t, slot]
        of_down[e] += weights[t, slot] * np.outer(pull[t], hidden)
        pulls = np.stack([of_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)), of_hidden * gate * sigmoid])
        of_gate_up[e] += pulls[:, :, None] * x[t]
        of_x[t] += np.einsum("xf,xfd->d", pulls, gate_up[e])
    names = ["out", "x", "weights", "gate_up", "down"]
    if rank:  # of W + b a with the gradient G: b^T G and G a^T
        names[3:], expected[3:] = ["gate_up a", "gate_up b", "down a", "down b"], []
        for whole, (a, b) in zip((of_gate_up, of_down), pairs, strict=True):
            of_b = np.einsum("e...d,erd->e...r", whole, a)
            of_a = np.einsum("efr,efd->erd", *(one.reshape(count, -1, one.shape[-1]) for one in (b, whole)))
            expected += of_a, of_b
    for name, one, exact in zip(names, found, expected, strict=False):
        assert one.shape == exact.shape and distance(one, exact) < 2 * BOUND, name
    assert len(found) == 3 + len(learnt)
