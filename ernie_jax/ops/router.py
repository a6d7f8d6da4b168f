"""Router: which k experts each token goes to, and with which weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax import kernels
from ernie_jax.errors import UserError
from ernie_jax.ops.norm import rms_norm
from ernie_jax.ops.precision import einsum

SPLITS = 8  # of router.cu


def route(
    x: jax.Array,  # [T, D]
    weight: jax.Array,  # [E, D] float32
    correction_bias: jax.Array,  # [E] float32
    k: int,
    norm_min: float,
    backend: str = "xla",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose the k largest of softmax(weight x) + correction_bias, all in float32; of equals the lower id.

    Args:
      norm_min: the least that a token's chosen probabilities are divided by, instead of their sum.
      backend: a name of ROUTER_BACKENDS; only "xla" has a gradient.

    Returns:
      experts [T, k] int32, best first; their weights [T, k] in the dtype of `x`, which add up to 1 and know no bias;
      probabilities [T, E] float32.

    Raises:
      UserError: if the backend does not take these shapes or dtypes.
    """
    return ROUTER_BACKENDS[backend](x, weight, correction_bias, k, norm_min)[1:]


def norm_and_route(
    x: jax.Array,  # [T, D]
    norm_weight: jax.Array,  # [D]
    epsilon: float,
    weight: jax.Array,  # [E, D] float32
    correction_bias: jax.Array,  # [E] float32
    k: int,
    norm_min: float,
    backend: str = "xla",
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Do `rms_norm`, then `route`.

    Returns:
      [T, D], normalised, and what `route` returns.
    """
    return ROUTER_BACKENDS[backend](x, weight, correction_bias, k, norm_min, (norm_weight, epsilon))


def default_router_backend(platform: str, tokens: int, width: int, experts: int, k: int, dtype: jnp.dtype) -> str:
    """Choose a backend.

    On GPUs our kernel for up to some hundreds of tokens, where it takes the shapes; "split" for others in bfloat16.
    """
    if platform != "gpu":
        return "xla"
    if tokens <= 512 and router_problem(width, experts, k, dtype) is None:
        return "cuda"
    return "split" if dtype == jnp.bfloat16 else "xla"


def router_problem(width: int, experts: int, k: int, dtype: jnp.dtype) -> str | None:
    """Say what the kernel does not take, if anything; `dtype` is that of x."""
    if dtype != jnp.bfloat16:
        return f"takes bfloat16, not {jnp.dtype(dtype).name}"
    if width % 128:
        return f"takes multiples of 128, not a width of {width}"
    if experts > 256 or k > min(16, experts):
        return f"takes up to 16 of up to 256 experts, not {k} of {experts}"
    return None


def _xla(x, weight, correction_bias, k, norm_min, norm=None):
    """The reference."""
    x = x if norm is None else rms_norm(x, *norm)
    return _choose(x, einsum("td,ed->te", x.astype(jnp.float32), weight), correction_bias, k, norm_min)


def _split(x, weight, correction_bias, k, norm_min, norm=None):
    """Have tensor cores multiply bfloat16 tokens by the three bfloat16 numbers that a float32 weight is the sum of.

    Each of these products is exact in float32, as those of the reference are not. Tensor cores cut sums off where
    others round them, so they add up a few hundred inputs and no more.
    """
    if x.dtype != jnp.bfloat16:
        raise UserError(f"router backend split takes bfloat16, not {x.dtype.name}; use router backend xla")
    x = x if norm is None else rms_norm(x, *norm)
    parts = []
    for _ in range(3):
        # A conversion there and back is what XLA would leave out.
        parts.append(jax.lax.reduce_precision(weight, exponent_bits=8, mantissa_bits=7))
        weight -= parts[-1]
    pieces = next(count for count in (4, 2, 1) if x.shape[1] % count == 0)
    rows, parts = (a.reshape(*a.shape[:-1], pieces, -1) for a in (x, jnp.stack(parts).astype(x.dtype)))
    logits = einsum("tcd,pecd->cpte", rows, parts, jnp.float32).sum(0)
    return _choose(x, logits[2] + logits[1] + logits[0], correction_bias, k, norm_min)


def _choose(x, logits, correction_bias, k, norm_min):
    probabilities = jax.nn.softmax(logits, axis=-1)
    _, experts = jax.lax.top_k(probabilities + correction_bias, k)
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), norm_min)
    return x, experts, weights.astype(x.dtype), probabilities


def _cuda(x, weight, correction_bias, k, norm_min, norm=None, clusters=True):
    """One kernel; without clusters two, as on GPUs that have none."""
    tokens, width = x.shape
    experts = len(weight)
    if problem := router_problem(width, experts, k, x.dtype):
        raise UserError(f"router backend cuda {problem}; use router backend xla")
    norm_weight, epsilon = norm or (jnp.zeros(0, x.dtype), 0.0)
    out = [
        jax.ShapeDtypeStruct((tokens, k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, k), x.dtype),
        jax.ShapeDtypeStruct((tokens, experts), jnp.float32),
        jax.ShapeDtypeStruct(x.shape if norm else (0,), x.dtype),
        jax.ShapeDtypeStruct((tokens, SPLITS, experts), jnp.float32),
    ]
    options = {"norm_min": float(norm_min), "epsilon": float(epsilon), "clusters": int(clusters)}
    *routing, normalised, _ = kernels.call("ernie_route", out, x, norm_weight, weight, correction_bias, **options)
    return normalised if norm else x, *routing


ROUTER_BACKENDS = {"xla": _xla, "split": _split, "cuda": _cuda}
