"""Grouped expert MLP: each token goes through its chosen experts' SwiGLU, weighted and summed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.ops.precision import einsum

_BLOCK_ROWS = 128


def grouped_mlp(
    x: jax.Array,  # [T, D]
    chosen: jax.Array,  # [T, k] int32
    weights: jax.Array,  # [T, k]
    gate_up: jax.Array,  # [E, 2, F, D]
    down: jax.Array,  # [E, D, F]
    backend: str,
) -> jax.Array:
    """Sum over a token's chosen experts e of weights[t, e] * down_e(silu(gate_e x) * up_e x).

    No token is ever dropped. Products accumulate in float32; the result has the dtype of `x`.

    Args:
      backend: a name of EXPERT_BACKENDS.

    Returns:
      [T, D].
    """
    return EXPERT_BACKENDS[backend](x, chosen, weights, gate_up, down)


def default_expert_backend(tokens: int, k: int) -> str:
    """Choose a backend by shape.

    Few tokens read only the experts they chose; some tens to hundreds read every expert once; more are sorted.
    """
    if tokens * k <= 8:
        return "gather"
    return "dense" if tokens <= 256 else "blocks"


def swiglu(gate_up: jax.Array, axis: int) -> jax.Array:
    """Return silu(gate) * up, of which `axis` holds gate and up; silu is computed in float32 and rounded once."""
    gate, up = jnp.moveaxis(gate_up, axis, 0)
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def _dense(x, chosen, weights, gate_up, down):
    """The reference: every expert on every token; tokens that did not choose it have weight zero."""
    experts = jnp.arange(gate_up.shape[0])
    combine = jnp.sum(jnp.where(chosen[..., None] == experts, weights[..., None], 0), axis=1)  # [T, E]
    hidden = swiglu(einsum("td,exfd->texf", x, gate_up), axis=2) * combine[..., None]  # [T, E, F]
    return einsum("tef,edf->etd", hidden, down, jnp.float32).sum(0).astype(x.dtype)


def _gather(x, chosen, weights, gate_up, down):
    """Read the chosen experts' weights where they lie, one (token, expert) pair after the other."""
    out = []
    for t in range(x.shape[0]):
        total = 0.0
        for slot in range(chosen.shape[1]):
            expert = chosen[t, slot]
            hidden = swiglu(einsum("d,xfd->xf", x[t], gate_up[expert]), axis=0)
            total += einsum("f,df->d", hidden, down[expert], jnp.float32) * weights[t, slot]
        out.append(total)
    return jnp.stack(out).astype(x.dtype)


def _blocks(x, chosen, weights, gate_up, down):
    """Sort (token, expert) pairs by expert into blocks of one expert each, and multiply block by block.

    The number of blocks is static: an expert leaves at most one of its blocks partly empty. (`jax.lax.ragged_dot` is a
    dense expansion on CPUs, on most TPUs and, up to JAX 0.11 at least, on GPUs.)
    """
    tokens, k = chosen.shape
    experts, pairs = gate_up.shape[0], tokens * k
    expert = chosen.reshape(-1)  # of each pair
    sizes = jnp.bincount(expert, length=experts)
    blocks = (sizes + _BLOCK_ROWS - 1) // _BLOCK_ROWS
    ends = jnp.cumsum(blocks)  # in blocks
    order = jnp.argsort(expert)
    rank = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs)) - (jnp.cumsum(sizes) - sizes)[expert]
    place = (ends - blocks)[expert] * _BLOCK_ROWS + rank  # [T * k] row of each pair

    count = min(pairs, pairs // _BLOCK_ROWS + experts)
    of_block = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), experts - 1)
    rows = jnp.zeros((count * _BLOCK_ROWS, x.shape[1]), x.dtype).at[place].set(jnp.repeat(x, k, axis=0))
    rows = rows.reshape(count, _BLOCK_ROWS, -1)
    hidden = swiglu(einsum("nbd,nxfd->nbxf", rows, gate_up[of_block]), axis=2)
    out = einsum("nbf,ndf->nbd", hidden, down[of_block], jnp.float32).reshape(count * _BLOCK_ROWS, -1)
    out = out[place].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", out, weights.astype(jnp.float32), precision="highest").astype(x.dtype)


EXPERT_BACKENDS = {"dense": _dense, "gather": _gather, "blocks": _blocks}
