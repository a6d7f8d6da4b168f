"""Products and activations that round once: float32 operands are really float32 on every chip."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def precision_of(*operands: jax.Array) -> jax.lax.Precision | None:
    """Return HIGHEST for float32 operands: the default is TF32 on GPUs and bfloat16 passes on TPUs."""
    return jax.lax.Precision.HIGHEST if all(x.dtype == jnp.float32 for x in operands) else None


def einsum(subscripts: str, x: jax.Array, y: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """Contract two arrays, accumulating in float32 and rounding once to `out_dtype` (default: that of `x`)."""
    out = jnp.einsum(subscripts, x, y, precision=precision_of(x, y), preferred_element_type=jnp.float32)
    return out.astype(out_dtype or x.dtype)


def linear(subscripts: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Contract and add a bias, both in float32, and round once to the dtype of `x`."""
    out = einsum(subscripts, x, weight, jnp.float32)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def swiglu(gate_up: jax.Array, axis: int) -> jax.Array:
    """Return silu(gate) * up, of which `axis` holds gate and up; silu is computed in float32 and rounded once."""
    gate, up = jnp.moveaxis(gate_up, axis, 0)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up
