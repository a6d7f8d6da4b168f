"""The layers of the decoder. Weights keep Hugging Face's orientation, [out, in].

Modules declare their parameters as abstract arrays; `initialize` or a checkpoint fills them in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ernie_jax.config import ModelConfig
from ernie_jax.ops import (
    Adapted,
    PagedAttention,
    Quantized,
    attention_half,
    attention_half_problem,
    default_expert_backend,
    default_linear_backend,
    default_router_backend,
    einsum,
    exchange_mlp,
    experts_half,
    experts_half_problem,
    grouped_mlp,
    linear,
    mlp,
    mlp_problem,
    norm_and_route,
    quantized_specs,
    rms_norm,
    route,
    swiglu,
    takes_shared,
)
from ernie_jax.sharding import WHOLE, Layout, Shard

# (layer index, q [..., K, R, H], k [..., K, H], v [..., K, H], cache) -> (out [..., K, R, H], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]]


def parameter(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype, init: str = "normal") -> nnx.Param:
    """Declare a parameter: its shape, logical axes, dtype, and how to draw it (normal, ones, ...)."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, init=init)


class Backends(NamedTuple):
    """Which backends compute experts, linear layers and routers and which moves tokens; names of `ops`' tables.

    Attributes:
      experts, linear, router: None chooses by `platform`, the number of tokens and the shapes.
      halves: whose halves of layers are used where they take a step, a name of ops.HALVES; None: our GPU kernels' where
        no other backend of theirs is asked for.
    """

    experts: str | None = None
    exchange: str = "padded"
    linear: str | None = None
    platform: str = "cpu"
    router: str | None = None
    halves: str | None = None

    @property
    def takes_halves(self) -> bool:
        asked = self.experts, self.linear, self.router
        return self.halves == "cuda" or self.halves is None and self.platform == "gpu" and asked == (None,) * 3


DEFAULT_BACKENDS = Backends()
# Tokens whose products with quantised shared experts run beside the router. Those of more take all registers of the
# multiprocessors, and what comes behind the router would wait for them.
_BESIDE = 64


class GroupRows(NamedTuple):
    """Where the tokens of a shard's data group lie among the T tokens of a step; without `start` all T are its own.

    A group takes a window of `length` rows from `start` on. Those beyond `count` are padding or another group's.

    Attributes:
      start, count: int32 scalars.
      total: int32 scalar, how many of the T tokens are no padding; None: all.
      length: static.
    """

    start: jax.Array | None = None
    count: jax.Array | None = None
    total: jax.Array | None = None
    length: int = 0

    def take(self, x: jax.Array) -> jax.Array:
        """Return the group's window [length, ...] of x [T, ...]."""
        if self.start is None:
            return x
        padded = jnp.pad(x, ((0, self.length), *((0, 0),) * (x.ndim - 1)))
        return jax.lax.dynamic_slice_in_dim(padded, self.start, self.length)

    def spread(self, y: jax.Array, tokens: int) -> jax.Array:
        """Put the window y [length, D] back among zeros [T, D]."""
        if self.start is None:
            return y
        y = jnp.where(jnp.arange(self.length)[:, None] < self.count, y, 0)
        zeros = jnp.zeros((tokens + self.length, y.shape[1]), y.dtype)
        return jax.lax.dynamic_update_slice_in_dim(zeros, y, self.start, 0)[:tokens]


ALL_ROWS = GroupRows()


class Linear(nnx.Module):
    """An affine map between named axes; the weight is [*out, *in].

    A quantised one has beside its `weight`, then the values of a Quantized, its scales as `scale`. One with an adapter
    (see `adapters`) has a `lora_a` and a `lora_b` as well.
    """

    def __init__(
        self, out: dict[str, int], into: dict[str, int], dtype, bias: bool = False, quantize: str | None = None
    ):
        shape, axes = (*out.values(), *into.values()), (*out, *into)
        if quantize:
            specs = quantized_specs(quantize, shape, len(out))
            self.weight = parameter(specs.values.shape, axes, specs.values.dtype, quantize)
            scale_axes = axes[: specs.scales.ndim]
            self.scale = parameter(specs.scales.shape, scale_axes, specs.scales.dtype, f"{quantize} scale")
        else:
            self.weight = parameter(shape, axes, dtype)
        self.inputs = len(into)
        if bias:
            self.bias = parameter(tuple(out.values()), tuple(out), dtype, "zeros")

    @property
    def kernel(self) -> jax.Array | Quantized | Adapted:
        """The weight as ops take it."""
        return self.read(lambda parameter: parameter[...])

    def read(self, part: Callable[[nnx.Param], Any]) -> Any:
        """Return a part of each parameter of the weight, arranged as the kernel is."""
        weight = part(self.weight)
        if hasattr(self, "scale"):
            weight = Quantized(weight, part(self.scale))
        return Adapted(weight, part(self.lora_a), part(self.lora_b)) if self.adapted else weight

    @property
    def adapted(self) -> bool:
        """Whether there is an adapter beside the weight, which of our kernels only those that train experts take."""
        return hasattr(self, "lora_a")

    def __call__(
        self, subscripts: str, x: jax.Array, backends: Backends = DEFAULT_BACKENDS, summed_over: jax.Array | int = 0
    ) -> jax.Array:
        """Apply to x; of shards whose results are to be summed, that with index `summed_over` 0 adds the bias."""
        weight, bias = self.kernel, None
        if hasattr(self, "bias"):
            bias = jnp.where(summed_over == 0, self.bias[...], 0)
        backend = "xla" if self.adapted else backends.linear
        if backend is None:
            inner = math.prod(weight.shape[-self.inputs :])
            backend = default_linear_backend(backends.platform, x, weight, inner)
        return linear(subscripts, x, weight, bias, backend)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, cast back before the product with the weight (transformers' order)."""

    def __init__(self, config: ModelConfig, dtype):
        self.weight = parameter((config.hidden_size,), ("embed",), dtype, "ones")
        self.epsilon = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D]
        return rms_norm(x, self.weight[...], self.epsilon)


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
        self.qkv = Linear(heads, model, dtype, config.use_bias, config.quantize)
        self.out = Linear(model, heads | {"group_head": group}, dtype, config.use_bias, config.quantize)

    def __call__(  # x [..., D]
        self,
        x: jax.Array,
        angles: jax.Array,
        attend: Attend,
        cache,
        shard: Shard = WHOLE,
        backends: Backends = DEFAULT_BACKENDS,
    ):
        """Return the sum over this shard's heads [..., D], and the cache."""
        qkv = self.qkv("...d,krhd->...krh", x, backends)
        if isinstance(attend, PagedAttention) and attend.takes_unrotated:
            out, cache = attend.rotating(qkv, angles, cache)
        else:
            rotated = rotate(qkv[..., :-1, :], angles[..., None, :])  # queries and the key
            out, cache = attend(rotated[..., :-1, :], rotated[..., -1, :], qkv[..., -1, :], cache)
        return self.out("...krh,dkrh->...d", out, backends, shard.index("kv_head")), cache

    def half(
        self, x: jax.Array, norm: RMSNorm, angles: jax.Array, attend: Attend, cache, residual: bool, backends: Backends
    ) -> tuple[jax.Array, jax.Array] | None:
        """Do `norm`, this and the addition of x, if `residual`, in one call; None if there is none for this step."""
        if not (backends.takes_halves and isinstance(attend, PagedAttention) and attend.backend == "cuda"):
            return None
        if self.qkv.adapted or self.out.adapted:
            return None
        qkv, out = self.qkv.kernel, self.out.kernel
        if hasattr(self.qkv, "bias") or attention_half_problem(x, qkv, out, cache, attend.batch):
            return None
        return attention_half(x, norm.weight[...], norm.epsilon, qkv, out, angles, cache, attend.batch, residual)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, width: int, dtype):
        model, inner = {"embed": config.hidden_size}, {"mlp": width}
        self.gate_up = Linear({"gate_up": 2, **inner}, model, dtype, config.use_bias, config.quantize)
        self.down = Linear(model, inner, dtype, config.use_bias, config.quantize)
        self.biased = config.use_bias

    def __call__(  # [..., D]
        self, x: jax.Array, shard: Shard = WHOLE, backends: Backends = DEFAULT_BACKENDS
    ) -> jax.Array:
        """Return the sum over this shard's part of the inner width, [..., D]."""
        gate_up = self.gate_up("...d,xfd->...xf", x, backends)
        return self.down("...f,df->...d", swiglu(gate_up, axis=-2), backends, shard.index("mlp"))

    def beside(self, x: jax.Array, shard: Shard, backends: Backends) -> jax.Array:
        """Do the same for x [T, D], where it can be by kernels that leave others room beside them."""
        gate_up, down = self.gate_up.kernel, self.down.kernel
        if self.biased or mlp_problem(len(x), *down.shape, gate_up.dtype):
            return self(x, shard, backends)
        return mlp(x, gate_up, down)


class Routing(NamedTuple):
    """What a router decided for T tokens.

    Attributes:
      experts: [T, k] int32.
      weights: [T, k].
      probabilities: [T, E] float32.
      log_total: [T] float32, the logarithm of what the exponentials of the logits add up to; of the reference only.
    """

    experts: jax.Array
    weights: jax.Array
    probabilities: jax.Array
    log_total: jax.Array | None = None


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

    def backend(self, x: jax.Array, backends: Backends) -> str:
        """Choose for x [T, D]."""
        experts = self.weight.shape[0]
        return backends.router or default_router_backend(backends.platform, *x.shape, experts, self.k, x.dtype)

    def after_norm(self, x: jax.Array, norm: RMSNorm, backends: Backends) -> tuple[jax.Array, Routing]:
        """Return x [T, D] normalised, and its routing."""
        weight, bias = self.weight[...], self.correction_bias[...]
        settings = self.k, self.norm_min, self.backend(x, backends)
        h, *routing = norm_and_route(x, norm.weight[...], norm.epsilon, weight, bias, *settings)
        return h, Routing(*routing)

    def __call__(self, x: jax.Array, backends: Backends = DEFAULT_BACKENDS) -> Routing:  # [T, D]
        weight, bias = self.weight[...], self.correction_bias[...]
        backend = self.backend(x, backends)
        routing = Routing(*route(x, weight, bias, self.k, self.norm_min, backend))
        if backend != "xla":
            return routing
        # For a training loss: the compiler finds the same product in `route`, and drops this where nobody asks for it.
        logits = einsum("td,ed->te", x.astype(jnp.float32), weight)
        return routing._replace(log_total=jax.nn.logsumexp(logits, axis=-1))


class Experts(nnx.Module):
    """The routed experts' weights, stacked."""

    def __init__(self, config: ModelConfig, dtype):
        experts, model = {"expert": config.moe_num_experts}, {"embed": config.hidden_size}
        inner = {"expert_mlp": config.moe_intermediate_size}
        self.gate_up = Linear({**experts, "gate_up": 2, **inner}, model, dtype, quantize=config.quantize)
        self.down = Linear({**experts, **model}, inner, dtype, quantize=config.quantize)
        self.count = config.moe_num_experts

    def __call__(
        self,
        x: jax.Array,
        experts: jax.Array,
        weights: jax.Array,
        shard: Shard,
        backends: Backends,
        shared: MLP | None = None,
        live: jax.Array | None = None,
        addends: Sequence[jax.Array] = (),
    ) -> jax.Array:
        """Return the weighted sum [T, D] over this shard's part of each token's experts; all of it if they exchange.

        Args:
          shared: whose output is added.
          live: how many of the tokens are no padding.
          addends: at most two arrays [T, D] that are added where nothing is exchanged.
        """
        gate_up, down = self.gate_up.kernel, self.down.kernel
        if shard.layout is not None and shard.layout.mesh.size > 1:
            y = self._divided(x, experts, weights, shard.layout, backends)
            return y if shared is None else y + shared(x, shard, backends)
        local, k = gate_up.shape[0], experts.shape[-1]
        first = shard.index("expert") * local

        def choose(tokens):
            return self._backend(tokens, k, local, backends, x.dtype)

        def compute(x, experts, weights, along=None, live=None):
            backend = choose(len(x))
            return grouped_mlp(x, experts, weights, gate_up, down, backend, first, along, live, addends=addends)

        def add_shared(y):
            if shared is None:
                return y
            with jax.named_scope("shared"):
                return y + shared(x, shard, backends)

        if shard.exchanges and local < self.count:
            if live is not None:
                experts = jnp.where(jnp.arange(len(x))[:, None] < live, experts, -1)
            y = exchange_mlp(
                x,
                experts,
                weights,
                compute,
                axes=shard.axes("expert"),
                experts_per_shard=local,
                backend=backends.exchange,
            )
            return add_shared(y)
        if shared is not None and not (shared.biased or shared.gate_up.adapted or shared.down.adapted):
            along = shared.gate_up.kernel, shared.down.kernel
            if takes_shared(choose(len(x)), len(x), down.shape[-1], along[1].shape[-1], down.dtype):
                return compute(x, experts, weights, along, live)
        return add_shared(compute(x, experts, weights, live=live))

    def _divided(
        self, x: jax.Array, experts: jax.Array, weights: jax.Array, layout: Layout, backends: Backends
    ) -> jax.Array:
        """Return the weighted sum [T, D] in a program that XLA divides: sorting and grouping is divided by hand.

        Each device takes the tokens of its groups, gathered from all devices that its experts are spread over, to the
        experts that it has; those cut along the model's width are gathered.
        """
        inside = layout.shard()
        gathered = tuple(axis for axis in inside.axes("group") if axis in inside.axes("expert"))
        summed = tuple(axis for axis in inside.axes("expert", "expert_mlp") if axis not in gathered)

        def compute(x, experts, weights, gate_up, down):
            if gathered:
                x, experts, weights = (jax.lax.all_gather(a, gathered, tiled=True) for a in (x, experts, weights))
            local = down.shape[0]
            backend = self._backend(len(x), experts.shape[-1], local, backends, x.dtype)
            first = inside.index("expert") * local
            y = grouped_mlp(x, experts, weights, gate_up, down, backend, first, total=self.count)
            if gathered:
                y = jax.lax.psum_scatter(y, gathered, tiled=True)
            return jax.lax.psum(y, summed) if summed else y

        def place(parameter):
            axes = parameter.get_metadata("axes")
            return layout.spec(tuple(None if axis == "embed" else axis for axis in axes))

        tokens = layout.spec(("group",))
        weight_places = self.gate_up.read(place), self.down.read(place)
        # The gradients of their own that the backends bring know nothing of what varies over which axes.
        divided = jax.shard_map(
            compute,
            mesh=layout.mesh,
            in_specs=(tokens, tokens, tokens, *weight_places),
            out_specs=tokens,
            check_vma=False,
        )
        return divided(x, experts, weights, self.gate_up.kernel, self.down.kernel)

    def backend(self, x: jax.Array, k: int, shard: Shard, backends: Backends) -> str | None:
        """Choose for x [T, D], of each token k experts; None where XLA divides the program."""
        if shard.layout is not None and shard.layout.mesh.size > 1:
            return None
        return self._backend(len(x), k, len(self.gate_up.kernel), backends, x.dtype)

    def _backend(self, tokens: int, k: int, local: int, backends: Backends, dtype: jnp.dtype) -> str:
        """Choose how so many tokens of a dtype go through so many of the experts."""
        down = self.down.kernel
        adapted = self.gate_up.adapted or self.down.adapted
        shape = (tokens, k, "cpu" if adapted else backends.platform, local, self.count)
        return backends.experts or default_expert_backend(*shape, *down.shape[1:], down.dtype, dtype)


class MoE(nnx.Module):
    """Routed experts plus, where the model has them, shared experts that are one MLP, unscaled and ungated."""

    def __init__(self, config: ModelConfig, dtype):
        self.router = Router(config)
        self.experts = Experts(config, dtype)
        if config.moe_num_shared_experts:
            self.shared = MLP(config, config.moe_shared_intermediate_size, dtype)

    def __call__(
        self,
        x: jax.Array,
        shard: Shard = WHOLE,
        backends: Backends = DEFAULT_BACKENDS,
        live: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Return the sum over this shard's part of the experts, [..., D], and the routing.

        Args:
          live: how many of the T tokens are no padding; padding is sent to no expert.
        """
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            routing = self.router(tokens, backends)
        with jax.named_scope("experts"):
            live = live if len(tokens) > 1 else None  # a single token is no padding
            shared = getattr(self, "shared", None)
            y = self.experts(tokens, routing.experts, routing.weights, shard, backends, shared, live)
        return y.reshape(x.shape), routing

    def half(
        self,
        x: jax.Array,
        norm: RMSNorm,
        shard: Shard,
        residual: bool,
        backends: Backends,
        live: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing] | None:
        """Do `norm`, this and the addition of x [T, D], if `residual`, by kernels that take them in; None if none does.

        Args:
          live: how many of the T tokens are no padding.
        """
        linears = [self.experts.gate_up, self.experts.down]
        if hasattr(self, "shared"):
            linears += [self.shared.gate_up, self.shared.down]
        if not backends.takes_halves or shard.exchanges or any(linear.adapted for linear in linears):
            return None
        return (self._half_of_one if len(x) == 1 else self._half_of_some)(x, norm, shard, residual, backends, live)

    def _half_of_one(self, x, norm, shard, residual, backends, _):
        gate_up, down = self.experts.gate_up.kernel, self.experts.down.kernel
        router, shared = self.router, None
        if hasattr(self, "shared"):
            if self.shared.biased:
                return None
            shared = self.shared.gate_up.kernel, self.shared.down.kernel
        if experts_half_problem(x, router.weight[...], router.k, gate_up, down, shared):
            return None
        first = shard.index("expert") * len(gate_up)
        y, *routing = experts_half(
            x, norm.weight[...], norm.epsilon, router.weight[...], router.correction_bias[...], router.k,
            router.norm_min, gate_up, down, first, shared, residual,
        )  # fmt: skip
        return y, Routing(*routing)

    def _half_of_some(self, x, norm, shard, residual, backends, live):
        """Add the shared experts and x to the weighted sum of the others.

        Our router normalises for itself: its blocks have their places when the shared experts' products come.
        """
        router, experts = self.router, self.experts
        if router.backend(x, backends) == "xla" or experts.backend(x, router.k, shard, backends) != "mosaic":
            return None
        h, along, addends = materialized(norm(x), backends), None, []
        if hasattr(self, "shared"):
            down, inner = experts.down.kernel, self.shared.down.kernel.shape[-1]
            if len(x) > _BESIDE and takes_shared("mosaic", len(x), down.shape[-1], inner, down.dtype):
                along = self.shared
            else:
                with jax.named_scope("shared"):
                    addends.append(self.shared.beside(h, shard, backends))
        if residual:
            addends.append(x)
        with jax.named_scope("router"):
            if router.backend(x, backends) == "cuda":
                h, routing = router.after_norm(x, norm, backends)
            else:
                routing = router(h, backends)
        with jax.named_scope("experts"):
            y = experts(h, routing.experts, routing.weights, shard, backends, along, live, addends)
        return y, routing


def materialized(h: jax.Array, backends: Backends) -> jax.Array:
    """Keep GPUs' XLA from multiplying by a norm's weight in each product that reads h, or in a pass of its own."""
    return jax.lax.optimization_barrier(h) if backends.platform == "gpu" else h


class DecoderLayer(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, dtype, moe: bool):
        self.input_norm = RMSNorm(config, dtype)
        self.attention = Attention(config, dtype)
        self.post_attention_norm = RMSNorm(config, dtype)
        self.mlp = MoE(config, dtype) if moe else MLP(config, config.intermediate_size, dtype)

    def __call__(
        self, x: jax.Array, angles: jax.Array, attend: Attend, cache, shard: Shard, rows: GroupRows, backends: Backends
    ):
        """Return (x [..., D], cache, Routing or None).

        The two sums over shards are all the communication there is, but for an exchange of tokens between experts.

        Args:
          rows: which of the tokens are this shard's group's.
        """
        with jax.named_scope("attention"):
            alone, half = not shard.axes(*shard.attention_parts), None  # nothing to sum: x can be added at once
            if rows.start is None:
                half = self.attention.half(x, self.input_norm, angles, attend, cache, alone, backends)
            if half is None:
                alone = False
                h = rows.take(materialized(self.input_norm(x), backends))
                out, cache = self.attention(h, angles, attend, cache, shard, backends)
            else:
                out, cache = half
            x = out if alone else x + shard.sum(rows.spread(out, len(x)), *shard.attention_parts)
        with jax.named_scope("mlp"):
            alone, half, routing = not shard.axes("mlp"), None, None
            if isinstance(self.mlp, MoE):
                half = self.mlp.half(x, self.post_attention_norm, shard, alone, backends, rows.total)
            if half is not None:
                h, routing = half
            else:
                alone, h = False, materialized(self.post_attention_norm(x), backends)
                if isinstance(self.mlp, MoE):
                    h, routing = self.mlp(h, shard, backends, rows.total)
                else:
                    h = self.mlp(h, shard, backends)
            x = h if alone else x + shard.sum(h, "mlp")
        return x, cache, routing
