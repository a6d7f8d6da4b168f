"""Rounding to int8, and products with quantised weights against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.errors import UserError
from ernie_jax.ops import Quantized, check_takes_quantized, default_expert_backend, dequantize, grouped_mlp, linear
from ernie_jax.ops import quantize as round_to_int8
from tests.ops import test_experts


def place(weight: Quantized) -> Quantized:
    return jax.tree.map(jnp.asarray, weight)


def plain_error(rows):
    """Return the squared error by channel of rounding without clipping."""
    steps = np.abs(rows).max(1, keepdims=True) / 127
    return ((np.rint(rows / steps) * steps - rows) ** 2).sum(1)


def test_rounding_is_at_least_as_good_as_without_clipping(rng):
    rows = rng.normal(size=(200, 2560)).astype(np.float32)
    quantized = round_to_int8(rows)
    assert quantized.values.dtype == np.int8 and quantized.scales.dtype == np.float32
    assert np.abs(quantized.values.astype(int)).max() == 127
    error = ((dequantize(quantized) - rows) ** 2).sum(1)
    assert (error <= plain_error(rows) * 1.001).all()
    assert error.sum() < 0.99 * plain_error(rows).sum()


def test_rounding_has_a_scale_for_each_output(rng):
    weight = rng.normal(size=(3, 2, 5, 64)) * 10.0 ** rng.integers(-9, 9, (3, 2, 5, 1))
    quantized = round_to_int8(weight, outputs=3)
    assert quantized.values.shape == weight.shape and quantized.scales.shape == (3, 2, 5)
    relative = np.linalg.norm(dequantize(quantized) - weight, axis=-1) / np.linalg.norm(weight, axis=-1)
    assert relative.max() < 0.015
    again = round_to_int8(weight.reshape(30, 64))
    np.testing.assert_array_equal(again.values.reshape(weight.shape), quantized.values)


def test_rounding_of_zeros_and_of_what_is_not_finite():
    quantized = round_to_int8(np.zeros((2, 8), np.float32))
    np.testing.assert_array_equal(dequantize(quantized), 0)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            round_to_int8(np.array([[1, bad]], np.float32))


CASES = [
    ("...d,krhd->...krh", (4, 32), (2, 3, 8, 32), 3),
    ("...krh,dkrh->...d", (4, 2, 3, 8), (32, 2, 3, 8), 1),
    ("...d,xfd->...xf", (1500, 32), (2, 24, 32), 2),
]


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_matches_float64(case, dtype, bound, biased, rng):
    subscripts, x_shape, shape, outputs = case
    x = jnp.asarray(rng.normal(size=x_shape), dtype)
    weight = round_to_int8(rng.normal(size=shape), outputs)
    bias = jnp.asarray(rng.normal(size=shape[:outputs]), dtype) if biased else None
    out = jax.jit(linear, static_argnums=0)(subscripts, x, place(weight), bias)
    values, scales = (np.asarray(a, np.float64) for a in (weight.values, weight.scales))
    exact = values * scales.reshape(*scales.shape, *(1,) * (values.ndim - outputs))
    expected = np.einsum(subscripts, np.asarray(x, np.float64), exact)
    if biased:
        expected += np.asarray(bias, np.float64)
    assert out.dtype == dtype
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1.5e-2)])
@pytest.mark.parametrize(
    ("backend", "tokens"), [("dense", 1), ("dense", 300), ("gather", 3), ("blocks", 3), ("blocks", 300)]
)
def test_experts_match_float64(backend, tokens, dtype, bound, rng):
    x, chosen, weights, *exact = test_experts.draw(rng, tokens, 3, 8, 24, 32, dtype)
    gate_up, down = (round_to_int8(np.asarray(w, np.float32), w.ndim - 1) for w in exact)
    run = jax.jit(grouped_mlp, static_argnums=5)
    out = run(x, chosen, weights, place(gate_up), place(down), backend)
    expected = test_experts.reference(x, chosen, weights, dequantize(gate_up), dequantize(down))
    assert out.dtype == dtype
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected) < bound
    shards = [
        run(x, chosen, weights, place(gate_up)[first : first + 4], place(down)[first : first + 4], backend, first)
        for first in (0, 4)
    ]
    total = np.asarray(shards[0], np.float64) + np.asarray(shards[1], np.float64)
    assert np.linalg.norm(total - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize(
    ("op", "backend"),
    [("expert", "cuda"), ("expert", "mosaic"), ("expert", "gmm"), ("linear", "cuda"), ("halves", "cuda")],
)
def test_kernels_that_do_not_take_int8_say_so(op, backend, rng):
    sentence = f"{op} backend {backend} does not take int8 weights; leave it out or choose"
    with pytest.raises(UserError, match=sentence):
        check_takes_quantized(op, backend)
    weight = place(round_to_int8(rng.normal(size=(8, 2, 24, 32)), 3))
    if op == "expert":
        with pytest.raises(UserError, match=sentence):
            grouped_mlp(jnp.zeros((1, 32)), jnp.zeros((1, 1), int), jnp.ones((1, 1)), weight, weight, backend)
    if op == "linear":
        with pytest.raises(UserError, match=sentence):
            linear("td,exfd->texf", jnp.zeros((1, 32)), weight, backend=backend)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("tokens", [1, 2, 64, 300, 4096])
def test_default_experts_backend_takes_int8(platform, tokens):
    backend = default_expert_backend(tokens, 6, platform, 64, 64, 2560, 1536, jnp.dtype(jnp.int8))
    check_takes_quantized("expert", backend)
