"""Our router kernel against float64, on a GPU, as one kernel and as the two of GPUs without clusters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.ops import ROUTER_BACKENDS, norm_route, rms_norm, route

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

EPSILON, NORM_MIN = 1e-5, 1e-12


@pytest.fixture(params=["one kernel", "two kernels"], autouse=True)
def kernels(request, monkeypatch):
    clusters = request.param == "one kernel"
    monkeypatch.setitem(ROUTER_BACKENDS, "cuda", functools.partial(ROUTER_BACKENDS["cuda"], clusters=clusters))


def draw(rng, tokens, width=2560, experts=64, bias=True):
    x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(experts, width)) * width**-0.5, jnp.float32)
    offsets = rng.uniform(20, 63) + rng.normal(size=experts) * 0.01 if bias else np.zeros(experts)
    return x, weight, jnp.asarray(offsets, jnp.float32)


def check(x, weight, bias, k, experts, weights, probabilities):
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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 255, 256, 512])
def test_matches_float64(tokens, bias, rng):
    inputs = draw(rng, tokens, bias=bias)
    check(*inputs, 6, *jax.jit(route, static_argnums=(3, 4, 5))(*inputs, 6, NORM_MIN, "cuda"))


@pytest.mark.parametrize(("width", "experts", "k"), [(128, 8, 2), (1024, 256, 16), (8192, 64, 8), (2688, 100, 7)])
@pytest.mark.parametrize("tokens", [1, 12, 20, 40, 100])
def test_other_sizes(tokens, width, experts, k, rng):
    inputs = draw(rng, tokens, width, experts)
    check(*inputs, k, *jax.jit(route, static_argnums=(3, 4, 5))(*inputs, k, NORM_MIN, "cuda"))


@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_of_equals_the_lower_id_is_chosen(tokens):
    inputs = jnp.ones((tokens, 2560), jnp.bfloat16), jnp.zeros((64, 2560)), jnp.zeros(64).at[40].set(1)
    experts, weights, _ = route(*inputs, 6, NORM_MIN, "cuda")
    np.testing.assert_array_equal(experts, np.tile([40, 0, 1, 2, 3, 4], (tokens, 1)))
    np.testing.assert_allclose(np.asarray(weights, np.float64), 1 / 6, rtol=2**-8)


def test_small_probabilities_are_divided_by_norm_min(rng):
    experts, weights, probabilities = route(*draw(rng, 3), 6, 4.0, "cuda")
    expected = np.take_along_axis(np.asarray(probabilities), np.asarray(experts), axis=1) / 4
    np.testing.assert_allclose(np.asarray(weights, np.float64), expected, rtol=2**-8)


@pytest.mark.parametrize("tokens", [1, 7, 64, 256])
def test_norm_route(tokens, rng):
    x, weight, bias = draw(rng, tokens)
    norm = jnp.asarray(rng.uniform(0.5, 1.5, 2560), jnp.bfloat16)
    run = jax.jit(norm_route, static_argnums=(2, 5, 6, 7))
    h, *routing = run(x * 3, norm, EPSILON, weight, bias, 6, NORM_MIN, "cuda")
    expected = np.asarray(rms_norm(x * 3, norm, EPSILON), np.float64)
    # Another order of the sum can turn a rounding before the product with the weight and one after it: rarely, but then
    # of all elements of a token with the same mantissa.
    np.testing.assert_allclose(np.asarray(h, np.float64), expected, rtol=2**-6)
    assert (np.asarray(h, np.float64) != expected).mean() < 0.05
    check(h, weight, bias, 6, *routing)


def test_repeated_in_one_program(rng):
    """Results do not depend on what ran before, nor on what runs beside."""
    inputs = [draw(rng, tokens) for tokens in (1, 4, 1, 30, 1, 256, 1, 8)]

    @jax.jit
    def run(inputs):
        return [route(*one, 6, NORM_MIN, "cuda") for one in inputs]

    first = run(inputs)
    for _ in range(50):
        again = run(inputs)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))
    for one, out in zip(inputs, first, strict=True):
        check(*one, 6, *out)
