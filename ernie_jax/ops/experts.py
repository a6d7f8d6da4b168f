"""Grouped expert MLP: each token goes through its chosen experts' SwiGLU, weighted and summed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ernie_jax.ops.batched import by_batches
from ernie_jax.ops.blocks import by_blocks
from ernie_jax.ops.gmm import by_gmm
from ernie_jax.ops.mosaic import mosaic_problem, takes_along
from ernie_jax.ops.mosaic_trained import by_mosaic_trained
from ernie_jax.ops.precision import einsum, swiglu
from ernie_jax.ops.quantized import Quantized, check_takes_quantized, form_of
from ernie_jax.ops.stream import FEW, by_stream, experts_problem


def grouped_mlp(
    x: jax.Array,  # [T, D]
    chosen: jax.Array,  # [T, k] int32
    weights: jax.Array,  # [T, k]
    gate_up: jax.Array | Quantized,  # [E, 2, F, D]
    down: jax.Array | Quantized,  # [E, D, F]
    backend: str,
    first_expert: jax.Array | int = 0,
    shared: tuple[jax.Array, jax.Array] | None = None,
    live: jax.Array | None = None,
    total: int | None = None,
    addends: Sequence[jax.Array] = (),
) -> jax.Array:
    """Sum over a token's chosen experts e of weights[t, e] * down_e(silu(gate_e x) * up_e x).

    No token is ever dropped. Products accumulate in float32; the result has the dtype of `x`.

    Args:
      chosen: ids of experts. The weights are those of experts first_expert to first_expert + E - 1; other ids (another
        shard's experts, or none at all for padding tokens) contribute nothing.
      backend: a name of EXPERT_BACKENDS.
      first_expert: may be traced.
      shared: (gate_up [2, F', D], down [D, F']) of an MLP that all tokens go through, unscaled; only where
        `takes_shared`.
      live: how many of the tokens are no padding, int32; padding goes to no expert, and what it comes back with is
        undefined but finite. None: all.
      total: how many experts the ids are of; None: E. Only the speed of "batched" depends on it.
      addends: at most two arrays [T, D] that are added.

    Returns:
      [T, D].

    Raises:
      UserError: if the backend does not take these shapes or dtypes.
    """
    if isinstance(gate_up, Quantized):
        check_takes_quantized("expert", backend, gate_up.form)
    more = () if shared is None else (shared,)
    if backend == "mosaic":
        return EXPERT_BACKENDS[backend](x, chosen, weights, gate_up, down, first_expert, shared, live, addends)
    if live is not None:
        chosen = jnp.where(jnp.arange(len(x))[:, None] < live, chosen, -1)
    if backend == "batched":
        more = (total,)
    return sum(addends, start=EXPERT_BACKENDS[backend](x, chosen, weights, gate_up, down, first_expert, *more))


def takes_shared(backend: str, tokens: int, inner: int, shared_inner: int, dtype: jnp.dtype = jnp.bfloat16) -> bool:
    """Tell whether a backend can compute the shared experts along with the chosen ones.

    Args:
      inner, shared_inner: width of an expert, and of the shared ones' MLP, on this shard.
      dtype: of the weights.
    """
    if backend == "mosaic":  # to it they are more experts of the same width
        return takes_along(tokens, dtype) and shared_inner % inner == 0
    # Of the 21B model's shared width of 3,072 each of 8 shards has 384, which the kernel does not take.
    return backend == "cuda" and tokens <= FEW and shared_inner % (512 if form_of(dtype) else 256) == 0


def default_expert_backend(
    tokens: int,
    k: int,
    platform: str = "cpu",
    local_experts: int | None = None,
    experts: int | None = None,
    width: int = 0,
    inner: int = 0,
    dtype: jnp.dtype = jnp.float32,
    activations: jnp.dtype = jnp.bfloat16,
) -> str:
    """Choose a backend by shape.

    Few tokens read only the experts they chose, unless this shard has no more than those; some tens to hundreds read
    every expert once; more are sorted, unless they choose half of all experts anyway: on TPUs for the grouped product
    that JAX brings ("gmm"), elsewhere in "blocks". On GPUs our kernels take the sizes that they know: "cuda" a single
    token, on Hopper GPUs "mosaic" any more, and on others "cuda" a few and some hundreds.

    Args:
      local_experts, experts: how many this shard has, and how many there are; None: enough to make no difference.
      width, inner, dtype: D, F and the dtype of the weights.
      activations: the dtype of the tokens.
    """
    ours = platform == "gpu" and activations == jnp.bfloat16
    if ours and tokens > 1 and mosaic_problem(width, inner, dtype) is None:
        return "mosaic"
    streams = tokens <= FEW or 128 < tokens <= 512  # between, where nearly all experts are read anyway, "dense" wins
    if ours and streams and experts_problem(tokens, width, inner, local_experts or 0, dtype) is None:
        return "cuda"
    if tokens * k <= min(8, local_experts or 8):
        return "gather"
    if tokens <= 256 or (experts is not None and 2 * k >= experts):
        return "dense"
    return "gmm" if platform == "tpu" and not form_of(dtype) else "blocks"


def _dense(x, chosen, weights, gate_up, down, first_expert):
    """The reference: every expert on every token; tokens that did not choose it have weight zero."""
    experts = first_expert + jnp.arange(gate_up.shape[0])
    combine = jnp.sum(jnp.where(chosen[..., None] == experts, weights[..., None], 0), axis=1)  # [T, E]
    hidden = swiglu(einsum("td,exfd->texf", x, gate_up), axis=2) * combine[..., None]  # [T, E, F]
    return einsum("tef,edf->etd", hidden, down, jnp.float32).sum(0).astype(x.dtype)


def _gather(x, chosen, weights, gate_up, down, first_expert):
    """Read the chosen experts' weights where they lie, one (token, expert) pair after the other.

    A pair without a local expert reads again what its token reads anyway, with weight zero: on GPUs that comes from
    cache, where a branch around it would cost a round trip to the host.
    """
    experts = gate_up.shape[0]
    chosen = chosen - first_expert
    local = (chosen >= 0) & (chosen < experts)
    weights = jnp.where(local, weights, 0)
    if not isinstance(first_expert, int):
        chosen = jnp.where(local, chosen, jnp.max(jnp.where(local, chosen, 0), axis=1, keepdims=True))
    out = []
    for t in range(x.shape[0]):
        total = 0.0
        for slot in range(chosen.shape[1]):
            # An id beyond the experts (padding) is clamped.
            pick = functools.partial(jax.lax.dynamic_index_in_dim, index=chosen[t, slot], keepdims=False)
            up, back = jax.tree.map(pick, (gate_up, down))
            hidden = swiglu(einsum("d,xfd->xf", x[t], up), axis=0)
            total += einsum("f,df->d", hidden, back, jnp.float32) * weights[t, slot]
        out.append(total)
    return jnp.stack(out).astype(x.dtype)


EXPERT_BACKENDS = {
    "dense": _dense,
    "gather": _gather,
    "blocks": by_blocks,
    "batched": by_batches,
    "gmm": by_gmm,
    "cuda": by_stream,
    "mosaic": by_mosaic_trained,
}

DIFFERENTIABLE_EXPERT_BACKENDS = ("dense", "gather", "blocks", "batched", "mosaic")  # which training can name
