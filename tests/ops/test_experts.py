"""Every expert backend against a float64 reference, on fresh random inputs."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.ops import DIFFERENTIABLE_EXPERT_BACKENDS, EXPERT_BACKENDS, default_expert_backend, grouped_mlp

# "gather" is unrolled over tokens: made for a few.
# tests/gpu holds the GPU's kernels to the same reference, at the sizes they take.
BACKENDS = [backend for backend in EXPERT_BACKENDS if backend not in ("cuda", "mosaic")]
FEW = [(backend, tokens) for backend in BACKENDS for tokens in (1, 3)]
MANY = [(backend, 300) for backend in BACKENDS if backend != "gather"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Run the kernel of "gmm" on any platform."""
    monkeypatch.setitem(EXPERT_BACKENDS, "gmm", functools.partial(EXPERT_BACKENDS["gmm"], interpret=True))


def reference(x, chosen, weights, gate_up, down, first_expert=0):
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    out = np.zeros_like(x)
    for t, experts in enumerate(chosen):
        for slot, e in enumerate(experts - first_expert):
            if not 0 <= e < len(gate_up):
                continue
            gate, up = gate_up[e] @ x[t]
            out[t] += weights[t, slot] * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def draw(rng, tokens, k, experts, width, model, dtype):
    x = jnp.asarray(rng.normal(size=(tokens, model)), dtype)
    chosen = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    weights = jnp.asarray(rng.dirichlet(np.ones(k), size=tokens), dtype)
    gate_up = jnp.asarray(rng.normal(size=(experts, 2, width, model)) / np.sqrt(model), dtype)
    down = jnp.asarray(rng.normal(size=(experts, model, width)) / np.sqrt(width), dtype)
    return x, chosen, weights, gate_up, down


# float32: about sqrt(width) roundings of 6e-8. bfloat16: exact inputs, hidden values rounded three times.
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1.5e-2)])
@pytest.mark.parametrize(("backend", "tokens"), FEW + MANY)
def test_matches_float64(backend, tokens, dtype, bound, rng):
    inputs = draw(rng, tokens, 3, 8, 24, 32, dtype)
    out = jax.jit(grouped_mlp, static_argnums=5)(*inputs, backend)
    assert out.dtype == dtype
    expected = reference(*inputs)
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize(("backend", "tokens"), FEW + MANY)
def test_shards_sum_to_the_whole_and_padding_adds_nothing(backend, tokens, rng):
    x, chosen, weights, gate_up, down = draw(rng, tokens, 3, 8, 24, 32, jnp.float32)
    chosen[tokens // 2 :, 1:] = rng.choice([-1, 8, 1000])  # at least one token is partly padding
    run = jax.jit(grouped_mlp, static_argnums=5)
    shards = []
    for first in range(0, 8, 2):
        mine = gate_up[first : first + 2], down[first : first + 2]
        shards.append(run(x, chosen, weights, *mine, backend, jnp.int32(first)))
        np.testing.assert_allclose(shards[-1], reference(x, chosen, weights, *mine, first), atol=2e-5)
    expected = reference(x, chosen, weights, gate_up, down)
    np.testing.assert_allclose(sum(shards), expected, atol=4e-5)
    np.testing.assert_allclose(run(x, chosen, weights, gate_up, down, backend), expected, atol=2e-5)
    np.testing.assert_array_equal(run(x, np.full_like(chosen, 8), weights, gate_up, down, backend), 0)


@pytest.mark.parametrize(
    ("backend", "tokens"), [("gather", 3), ("dense", 1500), ("blocks", 1500), ("batched", 1500), ("gmm", 1500)]
)
def test_no_token_is_dropped_when_all_choose_the_same_experts(backend, tokens, rng):
    x, _, weights, gate_up, down = draw(rng, tokens, 2, 8, 24, 32, jnp.float32)
    chosen = np.tile(np.array([5, 2], np.int32), (tokens, 1))
    expected = reference(x, chosen, weights, gate_up, down)
    np.testing.assert_allclose(grouped_mlp(x, chosen, weights, gate_up, down, backend), expected, atol=2e-5)
    one_shard = grouped_mlp(x, chosen, weights, gate_up[4:6], down[4:6], backend, 4)
    np.testing.assert_allclose(one_shard, reference(x, chosen, weights, gate_up[4:6], down[4:6], 4), atol=2e-5)


@pytest.mark.parametrize(
    ("backend", "tokens", "skewed"),
    [("gather", 4, False), ("blocks", 300, False), ("batched", 300, False), ("batched", 300, True)],
)
def test_gradient_is_that_of_dense(backend, tokens, skewed, rng):
    x, chosen, weights, gate_up, down = draw(rng, tokens, 3, 8, 24, 32, jnp.float32)
    if skewed:  # two experts get far more than their room
        chosen[: tokens // 2, :2] = 5, 2
        chosen[: tokens // 2, 2] = rng.choice([0, 1, 3, 4, 6, 7], tokens // 2)
    chosen[-tokens // 4 :] = 8
    cotangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def gradients(backend):
        def loss(x, weights, gate_up, down):
            return jnp.sum(grouped_mlp(x, chosen, weights, gate_up, down, backend) * cotangent)

        return jax.jit(jax.grad(loss, range(4)))(x, weights, gate_up, down)

    assert backend in DIFFERENTIABLE_EXPERT_BACKENDS
    for mine, dense in zip(gradients(backend), gradients("dense"), strict=True):
        np.testing.assert_allclose(mine, dense, atol=1e-5 * np.abs(dense).max())


@pytest.mark.parametrize("learnt", [(0, 1, 2, 3), (0,)])
def test_training_with_many_experts_expands_nothing(learnt, rng):
    """Neither its operations nor any array of "batched" are those of all tokens with all experts."""
    tokens, k, experts, width, model = 512, 2, 32, 24, 16
    x, chosen, weights, gate_up, down = draw(rng, tokens, k, experts, width, model, jnp.float32)

    def loss(x, weights, gate_up, down):
        return jnp.sum(grouped_mlp(x, chosen, weights, gate_up, down, "batched"))

    compiled = jax.jit(jax.grad(loss, learnt)).lower(x, weights, gate_up, down).compile()
    dense = 2 * tokens * experts * 3 * width * model * (3 if len(learnt) > 1 else 2)
    assert compiled.cost_analysis()["flops"] < dense / 4
    shapes = re.findall(r"[a-z0-9]+\[([0-9,]+)\]", compiled.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) < tokens * experts * model / 2


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        ((1, 6), "gather"),
        ((2, 6), "dense"),
        ((256, 6), "dense"),
        ((257, 6), "blocks"),
        ((1, 6, "gpu", 32, 64), "gather"),
        ((1, 6, "gpu", 4, 64), "dense"),
        ((257, 6, "gpu", 8, 64), "blocks"),
        ((257, 2, "gpu", 4, 4), "dense"),
        ((256, 6, "tpu", 8, 64), "dense"),
        ((257, 6, "tpu", 8, 64), "gmm"),
    ],
)
def test_default_backend(arguments, backend):
    assert default_expert_backend(*arguments) == backend
