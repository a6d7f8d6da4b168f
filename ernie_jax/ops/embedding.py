"""Table lookup: of quantised rows, and with a gradient that does not drown in rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.ops.quantized import Quantized


def embed(table: jax.Array | Quantized, tokens: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Return the rows of a table [V, D] for tokens [...]: [..., D].

    Args:
      dtype: of the rows of a quantised table, int8 or fp8, which are rounded to it once; others keep their own.
    """
    if not isinstance(table, Quantized):
        return _embed(table, tokens)
    rows = tokens.reshape(-1)
    if rows.size == 1:  # which would be a slice, for which a TPU copies a whole table of int8 into another layout
        rows = jnp.pad(rows, (0, 1))
    found = table.values[rows].astype(jnp.float32) * table.scales[rows][:, None]
    return found[: tokens.size].astype(dtype).reshape(*tokens.shape, -1)


@jax.custom_vjp
def _embed(table, tokens):
    """Look up rows.

    The gradient of a row is summed in float32 over all tokens that read it, and rounded once. Plain indexing sums in
    the table's dtype, where bfloat16 stops growing at 256 equal terms and a comma occurs thousands of times in a batch.
    """
    return table[tokens]


def _forward(table, tokens):
    return table[tokens], (table, tokens)


def _backward(residuals, gradient):
    table, tokens = residuals
    total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return total.astype(table.dtype), None


_embed.defvjp(_forward, _backward)
