"""The "cuda" backends for few tokens: our own GPU kernels, which read each weight once and at full width."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax import kernels
from ernie_jax.errors import UserError
from ernie_jax.ops.quantized import Quantized, form_of

FEW = 16  # tokens of a tensor-core tile: so many cost the kernels what one costs
GROUP = 128  # inputs of an int4 scale


def linear_problem(tokens: int, inner: int, outer: int, dtype: jnp.dtype) -> str | None:
    """Say what the kernel for products [T, K] x [N, K] does not take, if anything; `dtype` is that of the weights."""
    if tokens > FEW:
        return f"takes up to {FEW} tokens, not {tokens}"
    return _problem(dtype, 256, inner=inner) or (f"takes a multiple of 8 outputs, not {outer}" if outer % 8 else None)


def linear(x: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """Return x [T, K] times weight [N, K], transposed: [T, N].

    Raises:
      UserError: if the kernel does not take these shapes or dtypes.
    """
    problem = linear_problem(*x.shape, len(weight), weight.dtype) or operand_problem(x, weight)
    if problem:
        raise UserError(f"linear backend cuda {problem}; use linear backend xla")
    return kernels.call("ernie_linear", jax.ShapeDtypeStruct((len(x), len(weight)), x.dtype), x, *operands(weight))


def operands(*weights: jax.Array | Quantized) -> list[jax.Array]:
    """Return what the kernels take for weights: of each its values and its scales, of which bfloat16 has none."""
    parts = []
    for weight in weights:
        quantized = isinstance(weight, Quantized)
        parts += [weight.values, weight.scales] if quantized else [weight, jnp.zeros(0, jnp.float32)]
    return parts


def operand_problem(x: jax.Array, *weights: jax.Array | Quantized) -> str | None:
    """Say what our kernels do not take of activations and of int4's groups, if anything."""
    if x.dtype != jnp.bfloat16:
        return f"takes bfloat16 activations, not {jnp.dtype(x.dtype).name}"
    for weight in weights:
        if isinstance(weight, Quantized) and weight.form == "int4" and weight.group != GROUP:
            return f"takes int4 weights in groups of {GROUP}, not {weight.group}"
    return None


def experts_problem(tokens: int, width: int, inner: int, experts: int, dtype: jnp.dtype, shared: int = 0) -> str | None:
    """Say what the experts' kernels do not take, if anything; `shared` is the shared experts' width on this shard."""
    if tokens > 1 and form_of(dtype):
        return f"takes a single token with {form_of(dtype)} weights, not {tokens}"
    if experts > 256:
        return f"takes up to 256 experts a shard, not {experts}"
    return _problem(dtype, 512 if form_of(dtype) else 256, model=width, inner=inner, shared=shared)


def by_stream(x, chosen, weights, gate_up, down, first_expert, shared=None):
    """Read the weights of each chosen expert once, whoever chose it.

    Args:
      shared: (gate_up [2, F', D], down [D, F']) of an MLP that all tokens go through, added unscaled.
    """
    tokens, k = chosen.shape
    experts, _, inner, width = gate_up.shape
    shared_inner = 0 if shared is None else shared[1].shape[1]
    problem = experts_problem(tokens, width, inner, experts, gate_up.dtype, shared_inner)
    if problem := problem or operand_problem(x, gate_up, down, *(shared or ())):
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
        *operands(gate_up, down),
        jnp.asarray(first_expert, jnp.int32).reshape(1),
        *operands(*(shared or no_experts(gate_up))),
    )
    return out


def no_experts(weight: jax.Array | Quantized) -> tuple[jax.Array | Quantized, jax.Array | Quantized]:
    """Return what stands for the shared experts' weights where there are none, in the form of a weight."""
    nothing = jax.tree.map(lambda part: jnp.zeros((2, 0), part.dtype), weight)
    return nothing, nothing


def _problem(dtype: jnp.dtype, step: int, **sizes: int) -> str | None:
    if dtype != jnp.bfloat16 and not form_of(dtype):
        return f"takes bfloat16 and quantised weights, not {jnp.dtype(dtype).name}"
    for name, size in sizes.items():
        if size % step:
            return f"takes multiples of {step}, not {size} ({name} width)"
    return None
