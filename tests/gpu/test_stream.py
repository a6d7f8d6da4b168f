"""Our kernels for few tokens against float64, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.ops import grouped_mlp, linear

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

BOUND = 6e-3  # bfloat16 in and out, hidden values rounded up to four times


def distance(out, expected):
    out = np.asarray(out, np.float64)
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


def normal(seed, shape, scale):
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(jnp.bfloat16)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize(("inner", "outer"), [(2560, 3584), (2560, 2560), (12288, 2560), (256, 8), (2560, 20480)])
def test_linear(tokens, inner, outer):
    x, weight = normal(tokens, (tokens, inner), 1), normal(7, (outer, inner), inner**-0.5)
    out = jax.jit(functools.partial(linear, "td,od->to", backend="cuda"))(x, weight)
    assert distance(out, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T) < BOUND


def reference(x, chosen, weights, gate_up, down, first=0):
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    out = np.zeros_like(x)
    for e in range(len(gate_up)):
        token, slot = np.nonzero(np.asarray(chosen) == e + first)
        if len(token):
            gate, up = np.moveaxis(np.einsum("xfd,td->txf", np.asarray(gate_up[e], np.float64), x[token]), 1, 0)
            rows = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(down[e], np.float64).T
            np.add.at(out, token, rows * weights[token, slot, None])
    return out


def draw(tokens, k, experts, inner, width, skew, seed=0):
    rng = np.random.default_rng(seed + tokens)
    x = normal(seed + tokens, (tokens, width), 1)
    if skew:
        chosen = np.tile(rng.permutation(experts)[:k], (tokens, 1)).astype(np.int32)
    else:
        chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    weights = jnp.asarray(rng.dirichlet(np.ones(k), size=tokens), jnp.bfloat16)
    gate_up = normal(1, (experts, 2, inner, width), width**-0.5)
    return x, jnp.asarray(chosen), weights, gate_up, normal(2, (experts, width, inner), inner**-0.5)


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 33, 64, 65, 130, 256, 300])
def test_experts(tokens, skew):
    inputs = draw(tokens, 6, 64, 512, 512, skew)
    out = jax.jit(grouped_mlp, static_argnums=5)(*inputs, "cuda")
    assert distance(out, reference(*inputs)) < BOUND


@pytest.mark.parametrize("tokens", [1, 8, 64, 256])
def test_experts_at_full_size(tokens):
    inputs = draw(tokens, 6, 16, 1536, 2560, False)
    out = jax.jit(grouped_mlp, static_argnums=5)(*inputs, "cuda")
    assert distance(out, reference(*inputs)) < BOUND


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_shared_experts_along(tokens):
    inputs = draw(tokens, 6, 16, 512, 512, False)
    shared = normal(3, (2, 1024, 512), 512**-0.5), normal(4, (512, 1024), 1024**-0.5)
    out = jax.jit(grouped_mlp, static_argnums=5)(*inputs, "cuda", 0, shared)
    x = inputs[0]
    everyone = reference(x, jnp.zeros((tokens, 1), jnp.int32), np.ones((tokens, 1)), shared[0][None], shared[1][None])
    assert distance(out, reference(*inputs) + everyone) < BOUND


@pytest.mark.parametrize("tokens", [1, 9, 100])
def test_shards_and_padding(tokens):
    x, chosen, weights, gate_up, down = draw(tokens, 6, 32, 256, 512, False)
    chosen = np.array(chosen)
    chosen[tokens // 2 :, 2:] = 64  # padding, or somebody else's
    run = jax.jit(grouped_mlp, static_argnums=5)
    for first in (0, 16):
        part = slice(first, first + 16)
        out = run(x, chosen, weights, gate_up[part], down[part], "cuda", jnp.int32(first))
        expected = reference(x, chosen, weights, gate_up[part], down[part], first)
        assert np.abs(np.asarray(out, np.float64) - expected).max() < 0.05
        assert np.isfinite(np.asarray(out, np.float64)).all()
