"""Every expert backend against a float64 reference, on fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.ops import EXPERT_BACKENDS, default_expert_backend, grouped_mlp


def reference(x, chosen, weights, gate_up, down):
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    out = np.zeros_like(x)
    for t, experts in enumerate(chosen):
        for slot, e in enumerate(experts):
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
@pytest.mark.parametrize("tokens", [1, 3, 300])
@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
def test_matches_float64(backend, tokens, dtype, bound, rng):
    if backend == "gather" and tokens > 3:
        pytest.skip("unrolled over tokens: made for a few")
    inputs = draw(rng, tokens, 3, 8, 24, 32, dtype)
    out = jax.jit(grouped_mlp, static_argnums=5)(*inputs, backend)
    assert out.dtype == dtype
    expected = reference(*inputs)
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
def test_no_token_is_dropped_when_all_choose_the_same_experts(backend, rng):
    x, _, weights, gate_up, down = draw(rng, 20, 2, 8, 24, 32, jnp.float32)
    chosen = np.tile(np.array([5, 2], np.int32), (20, 1))
    out = grouped_mlp(x, chosen, weights, gate_up, down, backend)
    np.testing.assert_allclose(out, reference(x, chosen, weights, gate_up, down), atol=2e-5)


def test_default_reads_only_chosen_experts_for_one_token():
    assert [default_expert_backend(tokens, 6) for tokens in (1, 2, 256, 257)] == ["gather", "dense", "dense", "blocks"]
