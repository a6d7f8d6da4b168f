"""Ops: one contract, one pure-XLA reference and named backends each."""

from ernie_jax.ops.attention import (
    ATTENTION_BACKENDS,
    RaggedBatch,
    check_attention_backend,
    default_attention_backend,
    packed_attention,
    paged_attention,
)
from ernie_jax.ops.embedding import embed
from ernie_jax.ops.exchange import EXCHANGE_BACKENDS, default_exchange_backend, exchange_mlp
from ernie_jax.ops.experts import (
    DIFFERENTIABLE_EXPERT_BACKENDS,
    EXPERT_BACKENDS,
    default_expert_backend,
    grouped_mlp,
    takes_shared,
)
from ernie_jax.ops.norm import rms_norm
from ernie_jax.ops.precision import LINEAR_BACKENDS, default_linear_backend, einsum, linear, swiglu
from ernie_jax.ops.router import ROUTER_BACKENDS, default_router_backend, norm_route, route

__all__ = [
    "ATTENTION_BACKENDS",
    "DIFFERENTIABLE_EXPERT_BACKENDS",
    "EXCHANGE_BACKENDS",
    "EXPERT_BACKENDS",
    "LINEAR_BACKENDS",
    "ROUTER_BACKENDS",
    "RaggedBatch",
    "check_attention_backend",
    "default_attention_backend",
    "default_exchange_backend",
    "default_expert_backend",
    "default_linear_backend",
    "default_router_backend",
    "einsum",
    "embed",
    "exchange_mlp",
    "grouped_mlp",
    "linear",
    "norm_route",
    "packed_attention",
    "paged_attention",
    "rms_norm",
    "route",
    "swiglu",
    "takes_shared",
]
