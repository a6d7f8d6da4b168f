"""The "gmm" backend of the grouped expert MLP: JAX's grouped matrix product for TPUs on pairs sorted by expert."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from ernie_jax.ops.blocks import sort_pairs
from ernie_jax.ops.precision import swiglu

_ROWS = 128  # of a tile: the side of the smallest matrix unit; larger ones waste more where two experts share a tile
_SLAB = 2048  # rows multiplied at a time
_WEIGHTS_BYTES = 4 << 20  # of a tile


def by_gmm(x, chosen, weights, gate_up, down, first_expert, interpret=False):
    """Sort (token, expert) pairs by expert and multiply a slab of them at a time.

    There is room for all pairs to be local; the loop ends with the last that is, so work follows those. Each expert's
    result is rounded to the dtype of `x` before the weighted sum. Weights are read where they lie. Has no gradient.

    Args:
      interpret: run the kernel's semantics on any platform; for tests.
    """
    tokens, k = chosen.shape
    experts, _, width, model = gate_up.shape
    gate_up = gate_up.reshape(experts, 2 * width, model)
    expert, sizes, order, rank = sort_pairs(chosen - first_expert, experts)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)

    slab = min(_SLAB, -(-tokens * k // _ROWS) * _ROWS)
    slabs = -(-tokens * k // slab)
    token = jnp.pad(order // k, (0, slabs * slab - tokens * k))  # of each row

    def step(index, out):
        first = index * slab
        rows = x[jax.lax.dynamic_slice_in_dim(token, first, slab)]
        here = jnp.diff(jnp.clip(ends, first, first + slab), prepend=first)  # rows of each expert in this slab
        hidden = _product(rows, gate_up, here, interpret).reshape(slab, 2, width)
        y = _product(swiglu(hidden, axis=1), down, here, interpret)
        return jax.lax.dynamic_update_slice_in_dim(out, y, first, 0)

    out = jax.lax.fori_loop(0, -(-ends[-1] // slab), step, jnp.zeros((slabs * slab, model), x.dtype))
    # Rows that belong to no local expert hold whatever was in memory: read none of them.
    place = jnp.where(expert < experts, rank, len(out)).reshape(tokens, k)
    total = jnp.zeros(x.shape, jnp.float32)
    for slot in range(k):  # together they would be [T, k, D], which a TPU pads to [T, 8 or 16, D]
        y = out.at[place[:, slot]].get(mode="fill", fill_value=0).astype(jnp.float32)
        total += y * weights[:, slot, None].astype(jnp.float32)
    return total.astype(x.dtype)


def _product(rows, weight, sizes, interpret):
    """Multiply rows [M, in], sizes[e] of them by each weight[e] [out, in]: [M, out]."""
    # A tile spans the whole contraction: then an expert's weights stay in vector memory while its rows pass by, and are
    # read once. As many outputs as 4 MiB hold: two tiles of weights, two of rows and the sums fit into the 16 MiB that
    # a kernel gets on most chips.
    outputs, inner = weight.shape[1:]
    most = max(1, _WEIGHTS_BYTES // (inner * weight.dtype.itemsize * 128))
    lanes = [n for n in range(1, most + 1) if outputs % (128 * n) == 0]
    tiling = _ROWS, inner, 128 * max(lanes) if lanes else outputs
    # XLA keeps an array whose last dimension would not fill its lanes transposed: as such it needs no copy.
    as_stored = inner % 128 == 0
    if not as_stored:
        weight = weight.swapaxes(1, 2)
    exact = jax.default_matmul_precision("highest") if rows.dtype == jnp.float32 else contextlib.nullcontext()
    with exact:
        return gmm(rows, weight, sizes, rows.dtype, tiling, transpose_rhs=as_stored, interpret=interpret)
