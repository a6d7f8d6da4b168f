"""Ops: one contract, one pure-XLA reference and named backends each."""

from ernie_jax.ops.adapted import Adapted
from ernie_jax.ops.attention import (
    ATTENTION_BACKENDS,
    PagedAttention,
    RaggedBatch,
    StepNeeds,
    check_attention_backend,
    default_attention_backend,
    paged_attention,
    step_needs,
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
from ernie_jax.ops.halves import (
    ATTENTION_HALF_BACKENDS,
    EXPERTS_HALF_BACKENDS,
    HALVES,
    attention_half,
    attention_half_problem,
    experts_half,
    experts_half_problem,
)
from ernie_jax.ops.kept import KEPT
from ernie_jax.ops.mosaic import MLP_BACKENDS, mlp, mlp_problem
from ernie_jax.ops.mosaic_trained import trained_experts_problem
from ernie_jax.ops.norm import rms_norm
from ernie_jax.ops.packed import PACKED_ATTENTION_BACKENDS, default_packed_backend, packed_attention, packed_problem
from ernie_jax.ops.precision import LINEAR_BACKENDS, default_linear_backend, einsum, linear, swiglu
from ernie_jax.ops.quantized import (
    Quantized,
    check_takes_quantized,
    dequantize,
    form_of,
    group_size,
    pack,
    quantize,
    quantized_specs,
    widen,
)
from ernie_jax.ops.router import ROUTER_BACKENDS, default_router_backend, norm_and_route, route

__all__ = [
    "ATTENTION_BACKENDS",
    "ATTENTION_HALF_BACKENDS",
    "DIFFERENTIABLE_EXPERT_BACKENDS",
    "EXCHANGE_BACKENDS",
    "EXPERTS_HALF_BACKENDS",
    "EXPERT_BACKENDS",
    "HALVES",
    "KEPT",
    "LINEAR_BACKENDS",
    "MLP_BACKENDS",
    "PACKED_ATTENTION_BACKENDS",
    "ROUTER_BACKENDS",
    "Adapted",
    "PagedAttention",
    "Quantized",
    "RaggedBatch",
    "StepNeeds",
    "attention_half",
    "attention_half_problem",
    "check_attention_backend",
    "check_takes_quantized",
    "default_attention_backend",
    "default_exchange_backend",
    "default_expert_backend",
    "default_linear_backend",
    "default_packed_backend",
    "default_router_backend",
    "dequantize",
    "einsum",
    "embed",
    "exchange_mlp",
    "experts_half",
    "experts_half_problem",
    "form_of",
    "group_size",
    "grouped_mlp",
    "linear",
    "mlp",
    "mlp_problem",
    "norm_and_route",
    "pack",
    "packed_attention",
    "packed_problem",
    "paged_attention",
    "quantize",
    "quantized_specs",
    "rms_norm",
    "route",
    "step_needs",
    "swiglu",
    "takes_shared",
    "trained_experts_problem",
    "widen",
]
