"""The router's reference against float64, on fresh random inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.errors import UserError
from ernie_jax.ops import default_router_backend, route

SETTINGS = {"k": 6, "norm_min": 1e-12}


def draw(rng, tokens, width, experts, bias, dtype):
    x = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    weight = jnp.asarray(rng.normal(size=(experts, width)) * width**-0.5, jnp.float32)
    # Released models' biases are 20 to 63 and nearly equal.
    offsets = rng.uniform(20, 63) + rng.normal(size=experts) * 0.01 if bias else np.zeros(experts)
    return x, weight, jnp.asarray(offsets, jnp.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), [("xla", jnp.float32), ("xla", jnp.bfloat16), ("split", jnp.bfloat16)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_matches_float64(tokens, backend, dtype, bias, rng):
    inputs = draw(rng, tokens, 256, 64, bias, dtype)
    run = jax.jit(functools.partial(route, **SETTINGS, backend=backend))
    experts, weights, probabilities = run(*inputs)
    assert (experts.dtype, weights.dtype, probabilities.dtype) == (jnp.int32, dtype, jnp.float32)
    x, weight, offsets = (np.asarray(a, np.float64) for a in inputs)
    expected = np.exp(x @ weight.T)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    scores = np.sort(expected + offsets, axis=1)
    chosen = np.take_along_axis(expected, np.asarray(experts), axis=1)
    # Where scores are almost equal, float32 may turn them round.
    np.testing.assert_allclose(chosen + offsets[np.asarray(experts)], scores[:, :-7:-1], atol=1e-5)
    bound = 1e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(
        np.asarray(weights, np.float64), chosen / chosen.sum(1, keepdims=True), rtol=bound, atol=bound
    )


def test_of_equals_the_lower_id_is_chosen():
    x, weight = jnp.ones((2, 128)), jnp.zeros((64, 128))
    experts, weights, _ = route(x, weight, jnp.zeros(64).at[40].set(1), **SETTINGS)
    np.testing.assert_array_equal(experts, np.tile([40, 0, 1, 2, 3, 4], (2, 1)))
    np.testing.assert_allclose(weights, 1 / 6, rtol=1e-6)


def test_small_probabilities_are_divided_by_norm_min(rng):
    x, weight, bias = draw(rng, 3, 128, 16, True, jnp.float32)
    experts, weights, probabilities = route(x, weight, bias, 2, 4.0)
    np.testing.assert_allclose(weights, np.take_along_axis(probabilities, experts, axis=1) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        (("gpu", 1, 2560, 64, 6, jnp.bfloat16), "cuda"),
        (("gpu", 512, 8192, 64, 8, jnp.bfloat16), "cuda"),
        (("cpu", 1, 2560, 64, 6, jnp.bfloat16), "xla"),
        (("tpu", 1, 2560, 64, 6, jnp.bfloat16), "xla"),
        (("gpu", 513, 2560, 64, 6, jnp.bfloat16), "split"),
        (("gpu", 513, 2560, 64, 6, jnp.float32), "xla"),
        (("gpu", 1, 2560, 64, 6, jnp.float32), "xla"),
        (("gpu", 1, 2592, 64, 6, jnp.bfloat16), "split"),
        (("gpu", 1, 2560, 257, 6, jnp.bfloat16), "split"),
        (("gpu", 1, 2560, 64, 17, jnp.bfloat16), "split"),
    ],
)
def test_default_backend(arguments, backend):
    assert default_router_backend(*arguments) == backend


@pytest.mark.parametrize("backend", ["cuda", "split"])
def test_a_backend_says_what_it_does_not_take(backend, rng):
    with pytest.raises(UserError, match="takes bfloat16, not float32; use router backend xla"):
        route(*draw(rng, 1, 128, 16, False, jnp.float32), **SETTINGS, backend=backend)
