"""Ops: one contract, one pure-XLA reference and named backends each."""

from ernie_jax.ops.attention import RaggedBatch, packed_attention, paged_attention
from ernie_jax.ops.embedding import embed
from ernie_jax.ops.exchange import EXCHANGE_BACKENDS, default_exchange_backend, exchange_mlp
from ernie_jax.ops.experts import EXPERT_BACKENDS, default_expert_backend, grouped_mlp
from ernie_jax.ops.precision import einsum, linear, swiglu

__all__ = [
    "EXCHANGE_BACKENDS",
    "EXPERT_BACKENDS",
    "RaggedBatch",
    "default_exchange_backend",
    "default_expert_backend",
    "einsum",
    "embed",
    "exchange_mlp",
    "grouped_mlp",
    "linear",
    "packed_attention",
    "paged_attention",
    "swiglu",
]
