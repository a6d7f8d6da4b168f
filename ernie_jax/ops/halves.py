"""Half a decoder layer as one call, for a decode step of few tokens on a GPU.

At a single token a layer's kernels are so short that the gaps between them, and the time until each has its weights
flowing, are a good part of a step. In one call they follow one another early: each fetches its first weights while the
one before it ends. Layers that take no half run the ops one by one, with XLA's norms and additions between them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax import kernels
from ernie_jax.ops.attention import RaggedBatch
from ernie_jax.ops.decode_attention import decode_problem, partial_results, rotation
from ernie_jax.ops.pages import Pages, arrays, described, rebuilt
from ernie_jax.ops.quantized import Quantized
from ernie_jax.ops.router import SPLITS, router_problem
from ernie_jax.ops.stream import experts_problem, linear_problem, no_experts, operand_problem, operands

HALVES = ("cuda", "none")  # whose calls halves are


def attention_half(
    x: jax.Array,  # [T, D]
    norm_weight: jax.Array,  # [D]
    epsilon: float,
    qkv_weight: jax.Array | Quantized,  # [K, R + 2, H, D]
    out_weight: jax.Array | Quantized,  # [D, K, R, H]
    angles: jax.Array,  # [T, H / 2]
    pages: Pages,  # [P, page_size, 2K, H]
    batch: RaggedBatch,
    residual: bool,
    backend: str = "cuda",
) -> tuple[jax.Array, Pages]:
    """Norm, project, rotate, write and attend as `paged_attention`, project; add x if `residual`.

    Roundings are those of the separate ops. The step must be one that `attention_half_problem` has nothing against.

    Returns:
      [T, D] in the dtype of `x`, and the updated pages.
    """
    return ATTENTION_HALF_BACKENDS[backend](
        x, norm_weight, epsilon, qkv_weight, out_weight, angles, pages, batch, residual
    )


def attention_half_problem(x, qkv_weight, out_weight, pages, batch: RaggedBatch) -> str | None:
    """Say what of a step the half does not take, if anything; arguments as in `attention_half`."""
    kv_heads, lines, head_dim, width = qkv_weight.shape
    group, tokens = lines - 2, len(x)
    if batch.max_query != 1:
        return "takes steps of one new token a sequence"
    return (
        linear_problem(tokens, width, kv_heads * lines * head_dim, qkv_weight.dtype)
        or linear_problem(tokens, kv_heads * group * head_dim, width, out_weight.dtype)
        or operand_problem(x, qkv_weight, out_weight)
        or decode_problem(head_dim, x.dtype, pages.dtype, group, pages.shape[1])
    )


def experts_half(
    x: jax.Array,  # [1, D]
    norm_weight: jax.Array,  # [D]
    epsilon: float,
    router_weight: jax.Array,  # [E, D] float32
    correction_bias: jax.Array,  # [E] float32
    k: int,
    norm_min: float,
    gate_up: jax.Array | Quantized,  # [local E, 2, F, D]
    down: jax.Array | Quantized,  # [local E, D, F]
    first_expert: jax.Array | int,
    shared: tuple[jax.Array, jax.Array] | tuple[Quantized, Quantized] | None,
    residual: bool,
    backend: str = "cuda",
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Norm, `route`, `grouped_mlp` with the shared experts, for a single token; add x if `residual`.

    Returns:
      [1, D] in the dtype of `x`, and what `route` returns.
    """
    return EXPERTS_HALF_BACKENDS[backend](
        x, norm_weight, epsilon, router_weight, correction_bias, k, norm_min, gate_up, down, first_expert, shared,
        residual,
    )  # fmt: skip


def experts_half_problem(x, router_weight, k: int, gate_up, down, shared) -> str | None:
    """Say what of a step the half does not take, if anything; arguments as in `experts_half`."""
    experts, _, inner, width = gate_up.shape
    if len(x) != 1:
        return f"takes a single token, not {len(x)}"
    beside = 0 if shared is None else shared[1].shape[1]
    problem = experts_problem(1, width, inner, experts, gate_up.dtype, beside)
    problem = problem or operand_problem(x, gate_up, down, *(shared or ()))
    return problem or router_problem(width, len(router_weight), k, x.dtype)


def _cuda_attention(x, norm_weight, epsilon, qkv_weight, out_weight, angles, pages, batch, residual):
    kv_heads, lines, head_dim, _ = qkv_weight.shape
    tokens, group = len(x), lines - 2
    out, _, _, _, _, *written = kernels.call(
        "ernie_attention_half",
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((tokens, kv_heads, lines, head_dim), x.dtype),
            jax.ShapeDtypeStruct((tokens, kv_heads, group, head_dim), x.dtype),
            partial_results(group),
            *described(pages),
        ],
        x,
        norm_weight,
        *operands(qkv_weight, out_weight),
        rotation(angles),
        batch.positions,
        batch.rows,
        batch.page_table,
        *arrays(pages),
        aliases={10 + i: 5 + i for i in range(len(arrays(pages)))},
        epsilon=float(epsilon),
        residual=int(residual),
    )
    return out, rebuilt(pages, written)


def _cuda_experts(
    x, norm_weight, epsilon, router_weight, correction_bias, k, norm_min, gate_up, down, first_expert, shared, residual
):
    inner, experts = gate_up.shape[2], len(router_weight)
    out, chosen, weights, probabilities, *_ = kernels.call(
        "ernie_experts_half",
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((1, k), jnp.int32),
            jax.ShapeDtypeStruct((1, k), x.dtype),
            jax.ShapeDtypeStruct((1, experts), jnp.float32),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((1, SPLITS, experts), jnp.float32),
            jax.ShapeDtypeStruct((k, inner), x.dtype),
            jax.ShapeDtypeStruct((1, 0 if shared is None else shared[1].shape[1]), x.dtype),
        ],
        x,
        norm_weight,
        router_weight,
        correction_bias,
        *operands(gate_up, down),
        jnp.asarray(first_expert, jnp.int32).reshape(1),
        *operands(*(shared or no_experts(gate_up))),
        norm_min=float(norm_min),
        epsilon=float(epsilon),
        residual=int(residual),
    )
    return out, chosen, weights, probabilities


ATTENTION_HALF_BACKENDS = {"cuda": _cuda_attention}
EXPERTS_HALF_BACKENDS = {"cuda": _cuda_experts}
