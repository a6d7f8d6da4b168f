"""The layers of the decoder. Weights keep Hugging Face's orientation, [out, in].

Modules declare their parameters as abstract arrays; `initialize` or a checkpoint fills them in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ernie_jax.config import ModelConfig
from ernie_jax.ops import default_expert_backend, einsum, grouped_mlp, linear, swiglu

# (layer index, q [..., K, R, H], k [..., K, H], v [..., K, H], cache) -> (out [..., K, R, H], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]]


def parameter(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype, init: str = "normal") -> nnx.Param:
    """Declare a parameter: its shape, logical axes, dtype, and how to draw it (normal, ones or zeros)."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, init=init)


class Linear(nnx.Module):
    """An affine map between named axes; the weight is [*out, *in]."""

    def __init__(self, out: dict[str, int], into: dict[str, int], dtype, bias: bool = False):
        self.weight = parameter((*out.values(), *into.values()), (*out, *into), dtype)
        if bias:
            self.bias = parameter(tuple(out.values()), tuple(out), dtype, "zeros")

    def __call__(self, subscripts: str, x: jax.Array) -> jax.Array:
        return linear(subscripts, x, self.weight[...], self.bias[...] if hasattr(self, "bias") else None)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, cast back before the product with the weight (transformers' order)."""

    def __init__(self, config: ModelConfig, dtype):
        self.weight = parameter((config.hidden_size,), ("embed",), dtype, "ones")
        self.epsilon = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D]
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale).astype(x.dtype) * self.weight[...]


def rotary_angles(positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Return float32 rotation angles [..., H/2] of positions [...]."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # A power rounded once, as torch's is: NumPy's float32 power is off by a step here and there.
    powers = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    return positions[..., None].astype(jnp.float32) * frequencies


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate adjacent pairs (x0, x1), (x2, x3), ... of the head dim in float32; ERNIE's interleaved RoPE.

    Args:
      x: [..., heads, H].
      angles: [..., H/2], without the heads axis.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; where keys and values live is the business of `attend`."""

    def __init__(self, config: ModelConfig, dtype):
        group = config.queries_per_kv_head
        heads = {"kv_head": config.num_key_value_heads, "group_head": group + 2, "head_dim": config.head_dim}
        model = {"embed": config.hidden_size}
        self.qkv = Linear(heads, model, dtype, config.use_bias)
        self.out = Linear(model, heads | {"group_head": group}, dtype, config.use_bias)

    def __call__(self, x: jax.Array, angles: jax.Array, attend: Attend, cache):  # x [..., D]
        qkv = self.qkv("...d,krhd->...krh", x)
        rotated = rotate(qkv[..., :-1, :], angles[..., None, :])  # queries and the key
        out, cache = attend(rotated[..., :-1, :], rotated[..., -1, :], qkv[..., -1, :], cache)
        return self.out("...krh,dkrh->...d", out), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, width: int, dtype):
        model, inner = {"embed": config.hidden_size}, {"mlp": width}
        self.gate_up = Linear({"gate_up": 2, **inner}, model, dtype, config.use_bias)
        self.down = Linear(model, inner, dtype, config.use_bias)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D]
        gate_up = self.gate_up("...d,xfd->...xf", x)
        return self.down("...f,df->...d", swiglu(gate_up, axis=-2))


class Routing(NamedTuple):
    """What a router decided for T tokens: experts [T, k] int32, weights [T, k], probabilities [T, E] float32."""

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array


class Router(nnx.Module):
    """Choose k experts a token in float32; the correction bias takes part in the choice only.

    Real biases are 20 to 63 with a spread of 0.01, so both tensors stay float32 whatever the model's dtype, the bias is
    added exactly as written here, and probabilities are never recovered from biased scores.
    """

    def __init__(self, config: ModelConfig):
        experts = config.moe_num_experts
        self.weight = parameter((experts, config.hidden_size), ("expert_score", "embed"), jnp.float32)
        self.correction_bias = parameter((experts,), ("expert_score",), jnp.float32, "zeros")
        self.k = config.moe_k
        self.norm_min = config.moe_norm_min

    def __call__(self, x: jax.Array) -> Routing:  # [T, D]
        logits = einsum("td,ed->te", x.astype(jnp.float32), self.weight[...])
        probabilities = jax.nn.softmax(logits, axis=-1)
        _, experts = jax.lax.top_k(probabilities + self.correction_bias[...], self.k)
        weights = jnp.take_along_axis(probabilities, experts, axis=-1)
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), self.norm_min)
        return Routing(experts, weights.astype(x.dtype), probabilities)


class Experts(nnx.Module):
    """The routed experts' weights, stacked."""

    def __init__(self, config: ModelConfig, dtype):
        experts, model = {"expert": config.moe_num_experts}, {"embed": config.hidden_size}
        inner = {"mlp": config.moe_intermediate_size}
        self.gate_up = Linear({**experts, "gate_up": 2, **inner}, model, dtype)
        self.down = Linear({**experts, **model}, inner, dtype)


class MoE(nnx.Module):
    """Routed experts plus, where the model has them, shared experts that are one MLP, unscaled and ungated."""

    def __init__(self, config: ModelConfig, dtype):
        self.router = Router(config)
        self.experts = Experts(config, dtype)
        if config.moe_num_shared_experts:
            self.shared = MLP(config, config.moe_intermediate_size * config.moe_num_shared_experts, dtype)

    def __call__(self, x: jax.Array, backend: str | None) -> tuple[jax.Array, Routing]:  # [..., D]
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            routing = self.router(tokens)
        with jax.named_scope("experts"):
            backend = backend or default_expert_backend(len(tokens), self.router.k)
            weights = self.experts.gate_up.weight[...], self.experts.down.weight[...]
            y = grouped_mlp(tokens, routing.experts, routing.weights, *weights, backend)
        if hasattr(self, "shared"):
            with jax.named_scope("shared"):
                y = y + self.shared(tokens)
        return y.reshape(x.shape), routing


class DecoderLayer(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, dtype, moe: bool):
        self.input_norm = RMSNorm(config, dtype)
        self.attention = Attention(config, dtype)
        self.post_attention_norm = RMSNorm(config, dtype)
        self.mlp = MoE(config, dtype) if moe else MLP(config, config.intermediate_size, dtype)

    def __call__(self, x: jax.Array, angles: jax.Array, attend: Attend, cache, expert_backend: str | None):
        """Return (x [..., D], cache, Routing or None)."""
        with jax.named_scope("attention"):
            out, cache = self.attention(self.input_norm(x), angles, attend, cache)
            x = x + out
        with jax.named_scope("mlp"):
            h, routing = self.post_attention_norm(x), None
            if isinstance(self.mlp, MoE):
                h, routing = self.mlp(h, expert_backend)
            else:
                h = self.mlp(h)
        return x + h, cache, routing
