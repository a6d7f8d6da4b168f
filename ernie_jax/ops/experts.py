"""Grouped expert MLP: each token goes through its chosen experts' SwiGLU, weighted and summed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from ernie_jax.ops.precision import einsum, precision_of

# [M, in] x [E, out, in] -> [M, out], rows of x grouped by expert.
_BY_EXPERT = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


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


def default_expert_backend(platform: str, tokens: int, k: int) -> str:
    """Choose a backend by platform and shape.

    Few tokens read only the experts they chose; some tens to hundreds read every expert once; more are sorted. XLA's
    ragged product is a dense expansion on a CPU, where sorting therefore gains nothing.
    """
    if tokens * k <= 8:
        return "gather"
    return "sorted" if platform == "gpu" and tokens > 256 else "dense"


def _swiglu(gate_up: jax.Array, axis: int) -> jax.Array:
    gate, up = jnp.moveaxis(gate_up, axis, 0)
    return jax.nn.silu(gate) * up


def _dense(x, chosen, weights, gate_up, down):
    """The reference: every expert on every token; tokens that did not choose it have weight zero."""
    experts = jnp.arange(gate_up.shape[0])
    combine = jnp.sum(jnp.where(chosen[..., None] == experts, weights[..., None], 0), axis=1)  # [T, E]
    hidden = _swiglu(einsum("td,exfd->texf", x, gate_up), axis=2) * combine[..., None]  # [T, E, F]
    return einsum("tef,edf->etd", hidden, down, jnp.float32).sum(0).astype(x.dtype)


def _gather(x, chosen, weights, gate_up, down):
    """Read the chosen experts' weights where they lie, one (token, expert) pair after the other."""
    out = []
    for t in range(x.shape[0]):
        total = 0.0
        for slot in range(chosen.shape[1]):
            expert = chosen[t, slot]
            hidden = _swiglu(einsum("d,xfd->xf", x[t], gate_up[expert]), axis=0)
            total += einsum("f,df->d", hidden, down[expert], jnp.float32) * weights[t, slot]
        out.append(total)
    return jnp.stack(out).astype(x.dtype)


def _sorted(x, chosen, weights, gate_up, down):
    """Sort (token, expert) pairs by expert and multiply group by group."""
    tokens, k = chosen.shape
    experts, _, width, _ = gate_up.shape
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=experts)

    def product(lhs, rhs, dtype):
        return jax.lax.ragged_dot_general(
            lhs, rhs, sizes, _BY_EXPERT, precision=precision_of(lhs, rhs), preferred_element_type=jnp.float32
        ).astype(dtype)

    rows = x[order // k]  # [T * k, D]
    hidden = product(rows, gate_up.reshape(experts, 2 * width, -1), x.dtype)
    hidden = _swiglu(hidden.reshape(-1, 2, width), axis=1)
    out = product(hidden, down, jnp.float32)[jnp.argsort(order)].reshape(tokens, k, -1)
    return jnp.einsum("tkd,tk->td", out, weights.astype(jnp.float32), precision="highest").astype(x.dtype)


EXPERT_BACKENDS = {"dense": _dense, "gather": _gather, "sorted": _sorted}
