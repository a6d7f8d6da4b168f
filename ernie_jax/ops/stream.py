"""The "cuda" backends for few tokens: our own GPU kernels, which read each weight once and at full width."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax import kernels
from ernie_jax.errors import UserError

FEW = 16  # tokens of a tensor-core tile: so many cost the kernels what one costs


def linear_problem(tokens: int, inner: int, outer: int, dtype: jnp.dtype) -> str | None:
    """Say what the kernel for products [T, K] x [N, K] does not take, if anything."""
    if tokens > FEW:
        return f"takes up to {FEW} tokens, not {tokens}"
    return _problem(dtype, inner=inner) or (f"takes a multiple of 8 outputs, not {outer}" if outer % 8 else None)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return x [T, K] times weight [N, K], transposed: [T, N].

    Raises:
      UserError: if the kernel does not take these shapes or dtypes.
    """
    if problem := linear_problem(*x.shape, len(weight), weight.dtype):
        raise UserError(f"linear backend cuda {problem}; use linear backend xla")
    return kernels.call("ernie_linear", jax.ShapeDtypeStruct((len(x), len(weight)), x.dtype), x, weight)


def experts_problem(width: int, inner: int, experts: int, dtype: jnp.dtype, shared: int = 0) -> str | None:
    """Say what the experts' kernels do not take, if anything; `shared` is the shared experts' width on this shard."""
    if experts > 256:
        return f"takes up to 256 experts a shard, not {experts}"
    return _problem(dtype, model=width, inner=inner, shared=shared)


def by_stream(x, chosen, weights, gate_up, down, first_expert, shared=None):
    """Read the weights of each chosen expert once, whoever chose it.

    Args:
      shared: (gate_up [2, F', D], down [D, F']) of an MLP that all tokens go through, added unscaled.
    """
    tokens, k = chosen.shape
    experts, _, inner, width = gate_up.shape
    if shared is None:
        shared = jnp.zeros((2, 0, width), x.dtype), jnp.zeros((width, 0), x.dtype)
    shared_inner = shared[0].shape[1]
    if problem := experts_problem(width, inner, experts, gate_up.dtype, shared_inner):
        raise UserError(f"expert backend cuda {problem}; use expert backend dense")
    walks = tokens <= 16  # kWalks of experts.cu: then no pair's row goes to memory
    scratch = 2 + 2 * experts + tokens * k + (experts * tokens if walks else 0)
    out, *_ = kernels.call(
        "ernie_experts",
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((tokens * k, inner), x.dtype),
            jax.ShapeDtypeStruct((tokens, shared_inner), x.dtype),
            jax.ShapeDtypeStruct((0 if walks else tokens * k, width), jnp.float32),
            jax.ShapeDtypeStruct((scratch,), jnp.int32),
        ],
        x,
        chosen,
        weights.astype(x.dtype),
        gate_up,
        down,
        jnp.asarray(first_expert, jnp.int32).reshape(1),
        *shared,
    )
    return out


def _problem(dtype: jnp.dtype, **sizes: int) -> str | None:
    if dtype != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    for name, size in sizes.items():
        if size % 256:
            return f"takes multiples of 256, not {size} ({name} width)"
    return None
