"""Rounding to each form, and products with quantised weights against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ernie_jax.config import QUANTIZED_FORMS
from ernie_jax.errors import UserError
from ernie_jax.ops import (
    Quantized,
    check_takes_quantized,
    default_expert_backend,
    dequantize,
    embed,
    grouped_mlp,
    int4,
    linear,
    quantize,
    quantized_specs,
    widen,
)
from tests.ops import test_experts

FORMS = pytest.mark.parametrize("form", QUANTIZED_FORMS)


def place(weight: Quantized) -> Quantized:
    return jax.tree.map(jnp.asarray, weight)


def plain_error(rows, form):
    """Return the squared error of the simplest rounding: the largest weight is the largest value."""
    size = 128 if form == "int4" else rows.shape[1]
    rows = rows.reshape(-1, size)
    steps = np.abs(rows).max(1, keepdims=True) / {"int8": 127, "fp8": 448, "int4": 7}[form]
    exact = rows / steps
    rounded = exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if form == "fp8" else np.rint(exact)
    return ((rounded * steps - rows) ** 2).sum()


@pytest.mark.parametrize(
    ("form", "gain", "relative"), [("int8", 0.99, 0.009), ("fp8", 0.97, 0.027), ("int4", 0.7, 0.1)]
)
def test_rounding_is_better_than_the_simplest(form, gain, relative, rng):
    rows = rng.normal(size=(200, 2560)).astype(np.float32)
    error = ((dequantize(quantize(rows, 1, form)) - rows) ** 2).sum()
    assert error < gain * plain_error(rows, form)
    assert error < relative**2 * (rows**2).sum()


# A step of int4 is an eighth of the largest weight, which may be most of a row: sqrt(64) / 8 / sqrt(12).
@pytest.mark.parametrize(("form", "relative"), [("int8", 0.015), ("fp8", 0.03), ("int4", 0.29)])
def test_rounding_has_a_scale_for_each_output(form, relative, rng):
    weight = rng.normal(size=(3, 2, 5, 64)) * 10.0 ** rng.integers(-9, 9, (3, 2, 5, 1))
    quantized, specs = quantize(weight, 3, form), quantized_specs(form, weight.shape, 3)
    for array, spec in zip(jax.tree.leaves(quantized), jax.tree.leaves(specs), strict=True):
        assert array.shape == spec.shape and array.dtype == spec.dtype
    assert quantized.shape == weight.shape and quantized.size == weight.size and quantized.form == form
    error = np.linalg.norm(dequantize(quantized) - weight, axis=-1) / np.linalg.norm(weight, axis=-1)
    assert error.max() < relative
    again = quantize(weight.reshape(30, 64), 1, form)
    np.testing.assert_array_equal(dequantize(again).reshape(weight.shape), dequantize(quantized))
    np.testing.assert_array_equal(dequantize(quantized[1, 0]), dequantize(quantized)[1, 0])
    np.testing.assert_array_equal(dequantize(quantized.as_matrix(64)), dequantize(again))


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (192, 64), (96, 32), (48, 16)])
def test_int4_is_packed_in_halves_of_a_group(inputs, group, rng):
    weight = rng.normal(size=(6, inputs)).astype(np.float32)
    quantized = quantize(weight, 1, "int4")
    assert quantized.group == group and quantized.values.shape == (6, inputs // 2)
    wanted = np.empty_like(weight)
    for (row, column), byte in np.ndenumerate(quantized.values):
        first, j = divmod(column, group // 2)
        scale = np.float32(quantized.scales[row, first])
        wanted[row, first * group + j] = (int(byte & 15) - 8) * scale
        wanted[row, first * group + j + group // 2] = (int(byte >> 4) - 8) * scale
    np.testing.assert_array_equal(dequantize(quantized), wanted)
    steps = np.abs(quantized.scales.astype(np.float32)).repeat(group, axis=1)
    # Nothing is further from its weight than half a step, but for those cut off.
    far = np.abs(wanted - weight) > 0.501 * steps
    assert far.mean() < 0.05 and (np.abs(wanted)[far] >= 7 * steps[far] * 0.999).all()


def test_int4_of_a_width_without_groups():
    with pytest.raises(UserError, match="int4: 40 inputs are no multiple of 16; choose --quantize=int8 or fp8"):
        quantize(np.ones((2, 40), np.float32), 1, "int4")


@FORMS
def test_rounding_of_zeros_and_of_what_is_not_finite(form):
    for number in (0, 1e-44, -3e38):
        weight = np.full((2, 32), number, np.float32)
        assert np.abs(dequantize(quantize(weight, 1, form)) - weight).max() <= max(1e-44, abs(number) * 0.07)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            quantize(np.array([[1, bad] * 16], np.float32), 1, form)


CASES = [
    ("...d,krhd->...krh", (4, 32), (2, 3, 8, 32), 3),
    ("...krh,dkrh->...d", (4, 2, 3, 16), (32, 2, 3, 16), 1),
    ("...d,xfd->...xf", (1500, 256), (2, 24, 256), 2),
]


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
@pytest.mark.parametrize("biased", [False, True])
@FORMS
def test_linear_matches_float64(case, dtype, bound, biased, form, rng):
    subscripts, x_shape, shape, outputs = case
    x = jnp.asarray(rng.normal(size=x_shape), dtype)
    weight = quantize(rng.normal(size=shape), outputs, form)
    bias = jnp.asarray(rng.normal(size=shape[:outputs]), dtype) if biased else None
    out = jax.jit(linear, static_argnums=0)(subscripts, x, place(weight), bias)
    expected = np.einsum(subscripts, np.asarray(x, np.float64), dequantize(weight).astype(np.float64))
    if biased:
        expected += np.asarray(bias, np.float64)
    assert out.dtype == dtype
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
@pytest.mark.parametrize("shape", [(1, 1, 5, 384, 700), (2, 2, 40, 512, 96)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_the_kernel_for_tpus_matches_float64(shared, shape, dtype, bound, rng, monkeypatch):
    batch, count, tokens, inner, outputs = shape
    monkeypatch.setattr(int4, "_ROWS_BYTES", 48 * 2 * inner * np.dtype(dtype).itemsize)  # a few blocks of rows
    x = jnp.asarray(rng.normal(size=(1 if shared else batch, 2 * tokens, inner)), dtype)
    weight = quantize(rng.normal(size=(batch, count, outputs, inner)), 3, "int4")
    out = int4.by_kernel(x, place(weight), dtype, interpret=True)
    x = np.broadcast_to(np.asarray(x, np.float64), (batch, 2 * tokens, inner))
    expected = np.einsum("btk,bcnk->bctn", x, dequantize(weight))
    assert out.dtype == dtype and out.shape == expected.shape
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected) < bound


@pytest.mark.parametrize(("shape", "outputs"), [((24, 256), 1), ((3, 2, 8, 128), 3), ((16, 2, 3, 32), 1)], ids=str)
@FORMS
def test_widened_on_the_devices(shape, outputs, form, rng):
    weight = quantize(rng.normal(size=shape), outputs if form != "int4" else len(shape) - 1, form)
    wide = jax.jit(widen, static_argnums=1)(place(weight), jnp.float32)
    np.testing.assert_allclose(wide, dequantize(weight), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-7), (jnp.bfloat16, 4e-3)])
@pytest.mark.parametrize("shape", [(1,), (2, 7)], ids=str)
def test_lookup_matches_float64(shape, dtype, bound, rng):
    table = quantize(rng.normal(size=(96, 48)) * 10.0 ** rng.integers(-6, 6, (96, 1)))
    tokens = rng.integers(0, 96, shape)
    out = jax.jit(embed, static_argnums=2)(place(table), tokens, dtype)
    expected = table.values.astype(np.float64)[tokens] * table.scales.astype(np.float64)[tokens][..., None]
    assert out.dtype == dtype and out.shape == (*shape, 48)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=bound)


@pytest.mark.parametrize("tokens", [5, 1100])
@FORMS
def test_gradient_by_x(form, tokens, rng):
    """Adapters are trained beside quantised weights, of which no copy is kept for it."""
    x, weight = jnp.asarray(rng.normal(size=(tokens, 256)), jnp.float32), quantize(rng.normal(size=(24, 256)), 1, form)
    towards, weight = rng.normal(size=(tokens, 24)).astype(np.float32), place(weight)
    _, pull = jax.vjp(lambda x: linear("td,od->to", x, weight), x)
    np.testing.assert_allclose(pull(towards)[0], towards @ dequantize(weight), atol=1e-3)
    kept = [part.dtype for part in jax.tree.leaves(pull) if part.shape == weight.shape]
    assert jnp.float32 not in kept or tokens < 1024, kept


@pytest.mark.parametrize(
    ("backend", "tokens", "dtype", "bound"),
    [
        ("dense", 1, jnp.bfloat16, 1.5e-2),
        ("dense", 300, jnp.float32, 1e-5),
        ("gather", 2, jnp.float32, 1e-5),
        ("blocks", 3, jnp.float32, 1e-5),
        ("blocks", 300, jnp.bfloat16, 1.5e-2),
        ("batched", 300, jnp.float32, 1e-5),
    ],
)
@FORMS
def test_experts_match_float64(backend, tokens, dtype, bound, form, rng):
    x, chosen, weights, *exact = test_experts.draw(rng, tokens, 3, 8, 32, 64, dtype)
    gate_up, down = (quantize(np.asarray(w, np.float32), w.ndim - 1, form) for w in exact)
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


@FORMS
def test_a_kernel_that_does_not_take_a_form_says_so(form, rng):
    sentence = f"expert backend gmm does not take {form} weights; leave it out or choose"
    with pytest.raises(UserError, match=sentence):
        check_takes_quantized("expert", "gmm", form)
    weight = place(quantize(rng.normal(size=(8, 2, 32, 32)), 3, form))
    with pytest.raises(UserError, match=sentence):
        grouped_mlp(jnp.zeros((1, 32)), jnp.zeros((1, 1), int), jnp.ones((1, 1)), weight, weight, "gmm")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("tokens", [1, 2, 64, 300, 4096])
@FORMS
def test_default_experts_backend_takes_every_form(form, platform, tokens):
    dtype = quantized_specs(form, (64, 2560, 1536), 2).dtype
    check_takes_quantized("expert", default_expert_backend(tokens, 6, platform, 64, 64, 2560, 1536, dtype), form)
