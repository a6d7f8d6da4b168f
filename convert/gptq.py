"""GPTQ: weights are rounded input by input, and those still to come make up for the error that this leaves.

What is minimised is the squared error of a layer's outputs on some text: of a matrix W [out, in] that of W x, which is
the trace of (W - Q) H (W - Q)^T, where H sums x x^T. Source: Frantar et al., arXiv 2210.17323.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.ops import Quantized, pack, quantize
from ernie_jax.ops.quantized import FP8, STEPS

_DAMPING = 0.01  # of the mean of H's diagonal, added to it: what the text does not show is not thrown away
_BLOCK = 128  # inputs after which the error goes on to all that follow
_HIGHEST = jax.lax.Precision.HIGHEST


@jax.jit
def gram(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the sum of (weight x) (weight x)^T over rows x [T, in] with weights [T], in float32."""
    x = x.astype(jnp.float32) * weights[:, None]
    return jnp.dot(x.T, x, precision=_HIGHEST)


@jax.jit
def factor(hessian: jax.Array) -> jax.Array:
    """Return the upper triangular U with U^T U = (H + damping)^-1; inputs that are always zero are left alone."""
    diagonal = jnp.diagonal(hessian)
    added = jnp.where(diagonal == 0, 1, 0) + _DAMPING * jnp.mean(diagonal)
    # H + damping = V V^T with V upper triangular: Cholesky's factor from the other end.
    upper = jnp.linalg.cholesky((hessian + jnp.diag(added))[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(hessian), dtype=upper.dtype), lower=False)


def round_to(weight: np.ndarray, factor: jax.Array, groups: int, form: str) -> Quantized:
    """Round a matrix to a form, with the scales that `quantize` finds.

    Args:
      weight: [out, in] float32.
      factor: [in, in], of `factor`.
      groups: how many of its numbers share a scale.

    Returns:
      Flat: values [out * in / groups, ...] and scales [out * in / groups].

    Raises:
      ValueError: on weights that are not finite.
    """
    scales = quantize(weight.reshape(-1, groups), form=form).scales.reshape(-1)
    spread = np.repeat(scales.astype(np.float32), groups).reshape(weight.shape)
    steps = np.asarray(_round(weight, spread, factor, form))
    return Quantized(pack(steps.reshape(-1, groups), form), scales)


@functools.partial(jax.jit, static_argnames="form")
def _round(weight: jax.Array, scales: jax.Array, factor: jax.Array, form: str) -> jax.Array:
    """Return the steps [out, in], in float32."""
    inputs = weight.shape[1]
    size = math.gcd(inputs, _BLOCK)

    def block(rest, start):
        upper = jax.lax.dynamic_slice_in_dim(factor, start, size)
        own = jax.lax.dynamic_slice_in_dim(upper, start, size, axis=1)
        part, scale = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (rest, scales.T))

        def column(i, carry):
            part, steps, errors = carry
            step = jnp.clip(part[i] / scale[i], *STEPS[form])
            step = step.astype(jnp.float8_e4m3fn).astype(jnp.float32) if form == FP8 else jnp.round(step)
            error = (part[i] - step * scale[i]) / own[i, i]
            return part - own[i][:, None] * error, steps.at[i].set(step), errors.at[i].set(error)

        zeros = jnp.zeros_like(part)
        _, steps, errors = jax.lax.fori_loop(0, size, column, (part, zeros, zeros))
        return rest - jnp.dot(upper.T, errors, precision=_HIGHEST), steps

    # The inputs first, so that one is consecutive in memory. U is zero left of the diagonal: what is done stays.
    _, steps = jax.lax.scan(block, weight.T, jnp.arange(0, inputs, size))
    return steps.reshape(weight.T.shape).T
