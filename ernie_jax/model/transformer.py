"""Ernie: the whole decoder, and how to fill it with random weights."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ernie_jax.config import ModelConfig
from ernie_jax.model.layers import (
    ALL_ROWS,
    DEFAULT_BACKENDS,
    Attend,
    Backends,
    DecoderLayer,
    GroupRows,
    Linear,
    RMSNorm,
    Routing,
    parameter,
    rotary_angles,
)
from ernie_jax.ops import Quantized, default_linear_backend, embed, linear, packed_attention
from ernie_jax.sharding import WHOLE, Layout, Shard, shard_abstract


class ModelOutput(NamedTuple):
    """Hidden states [..., D] after the final norm, the caches, and the Routing of each MoE layer in order."""

    hidden: jax.Array
    caches: list
    routing: tuple[Routing, ...]


class Table(Linear):
    """A weight [V, D], in int8 if the config wants that."""

    def __init__(self, config: ModelConfig, dtype):
        form = "int8" if config.quantize_embedding else None
        super().__init__({"vocab": config.vocab_size}, {"embed": config.hidden_size}, dtype, quantize=form)


class Embedding(Table):
    """Token embedding, unscaled; also the output head of a tied model.

    Attributes:
      dtype: of what is looked up.
    """

    def __init__(self, config: ModelConfig, dtype):
        super().__init__(config, dtype)
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens: jax.Array, shard: Shard = WHOLE) -> jax.Array:  # [...] -> [..., D]
        table = self.kernel
        if shard.size("vocab") == 1:
            return embed(table, tokens, self.dtype)
        row = tokens - shard.index("vocab") * len(table)
        mine = (row >= 0) & (row < len(table))
        x = jnp.where(mine[..., None], embed(table, jnp.where(mine, row, 0), self.dtype), 0)
        return shard.sum(x, "vocab")


class Head(Table):
    """What the output head owns: its weight unless tied to the embedding, its bias if the model has one."""

    def __init__(self, config: ModelConfig, dtype):
        if not config.tie_word_embeddings:
            super().__init__(config, dtype)
        if config.head_bias:
            self.bias = parameter((config.vocab_size,), ("vocab",), dtype, "zeros")


class MultiTokenPrediction(nnx.Module):
    """One depth of multi-token prediction (PT checkpoints): a dense layer that looks one token further ahead.

    Depth 1 makes of the hidden states after the final norm at t, and of token t + 1, those that predict token t + 2:
    after the model's own norm and head. Depth d goes on from the normed output of the one before and takes token t + d.

    Sources: modeling_moe.py of PaddleFormers' ernie_pretrain, which takes hidden states before the final norm, and
    FastDeploy's ernie4_5_mtp.py, which serves with those after it; with the released weights these are better.
    """

    def __init__(self, config: ModelConfig, dtype):
        self.embed_norm = RMSNorm(config, dtype)
        self.hidden_norm = RMSNorm(config, dtype)
        self.proj = Linear({"embed": config.hidden_size}, {"embed_pair": 2 * config.hidden_size}, dtype)
        self.layer = DecoderLayer(config, dtype, moe=False)

    def __call__(
        self,
        hidden: jax.Array,  # [..., D]
        embedded: jax.Array,  # [..., D]
        angles: jax.Array,
        attend: Attend,
        cache=None,
        backends: Backends = DEFAULT_BACKENDS,
    ):
        """Return the output [..., D], before any norm, and the cache; `embedded` are the tokens that come next."""
        pair = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        x = self.proj("...e,de->...d", pair, backends)
        return self.layer(x, angles, attend, cache, WHOLE, ALL_ROWS, backends)[:2]


class Ernie(nnx.Module):
    """An ERNIE 4.5 text model.

    The constructor declares abstract parameters only (shape, dtype, logical axes); fill them with `initialize` or from
    a checkpoint. Nothing here knows whether it runs for inference or training: `attend` and the caches are handed in.

    Source: `transformers` modeling_ernie4_5_moe.py and modeling_ernie4_5.py.
    """

    def __init__(self, config: ModelConfig, dtype=jnp.bfloat16):
        self.config = config
        self.embed = Embedding(config, dtype)
        self.layers = nnx.List(
            [DecoderLayer(config, dtype, config.is_moe_layer(i)) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config, dtype)
        if not config.tie_word_embeddings or config.head_bias:
            self.head = Head(config, dtype)
        self.mtp = nnx.List([MultiTokenPrediction(config, dtype) for _ in range(config.num_nextn_predict_layers)])

    def __call__(
        self,
        tokens: jax.Array,  # [...] int32
        positions: jax.Array,  # [...] int32
        attend: Attend,
        caches: list | None = None,
        *,
        backends: Backends = DEFAULT_BACKENDS,
        shard: Shard = WHOLE,
        rows: GroupRows = ALL_ROWS,
        remember: Callable[[Callable], Callable] = lambda layer: layer,
    ) -> ModelOutput:
        """Run the decoder.

        Inside `jax.shard_map` the weights are one shard's and `tokens` [T] are those of all shards, every one of which
        computes the same hidden states; only `attend`, `positions` and the caches are its own data group's. A shard
        that exchanges computes and returns the hidden states of its group alone.

        Args:
          positions: of the group's rows.
          attend: (q [..., K, R, H], k [..., K, H], v [..., K, H], cache) -> (out [..., K, R, H], cache); called once a
            layer with that layer's entry of `caches`.
          caches: one entry a layer; None without a cache.
          shard: this shard's view of the layout.
          rows: this group's window of the tokens; default: all of them.
          remember: makes of the function that runs a layer one that remembers less for its gradient: jax.checkpoint.
        """
        caches = list(caches) if caches is not None else [None] * len(self.layers)
        with jax.named_scope("embed"):
            x = self.embed(tokens, shard)
            if shard.exchanges:  # from here on each shard has its group's tokens only
                x, rows = rows.take(x), GroupRows(total=rows.count)
        angles = rotary_angles(positions, self.config)
        routing = []

        def run(layer, x, cache):
            return layer(x, angles, attend, cache, shard, rows, backends)

        run = remember(run)
        if isinstance(x, jax.core.Tracer):  # not called as it is: that would compile anew each time
            run = jax.jit(run)  # layers that are alike are traced once: of 28 that saves three quarters of the time

        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, caches[i], routed = run(layer, x, caches[i])
            if routed is not None:
                routing.append(routed)
        return ModelOutput(self.norm(x), caches, tuple(routing))

    def logits(self, hidden: jax.Array, backends: Backends = DEFAULT_BACKENDS) -> jax.Array:
        """Map hidden states [..., D] to logits [..., V], in the model's dtype; of a shard's slice of the vocabulary."""
        with jax.named_scope("head"):
            weight, bias = self.head_weights()
            backend = backends.linear or default_linear_backend(backends.platform, hidden, weight, weight.shape[1])
            return linear("...d,vd->...v", hidden, weight, bias, backend)

    def head_weights(self) -> tuple[jax.Array | Quantized, jax.Array | None]:
        """Return the output head's weight [V, D], which may be the embedding's, and its bias [V] if it has one."""
        table = self.embed if self.config.tie_word_embeddings else self.head
        return table.kernel, self.head.bias[...] if self.config.head_bias else None


def forward(model: Ernie, tokens: jax.Array) -> jax.Array:
    """Return logits [B, T, V] after every token of whole sequences [B, T], without a cache.

    A pure function, ready for `jax.jit` and `jax.grad` over the model (a pytree).
    """
    return model.logits(_run(model, tokens).hidden)


def routing(model: Ernie, tokens: jax.Array) -> tuple[Routing, ...]:
    """Return what each layer of `config.moe_layers` decided for whole sequences [B, T]; its arrays begin with [B, T].

    A pure function, ready for `jax.jit`.
    """
    found = _run(model, tokens).routing
    return jax.tree.map(lambda array: array.reshape(*tokens.shape, *array.shape[1:]), found)


def _run(model: Ernie, tokens: jax.Array) -> ModelOutput:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    one_document = jnp.zeros_like(tokens)
    return model(tokens, positions, lambda q, k, v, cache: (packed_attention(q, k, v, one_document), cache))


def parameter_specs(config: ModelConfig, dtype=jnp.bfloat16) -> dict[str, jax.ShapeDtypeStruct]:
    """List every parameter of a model: dotted path -> shape and dtype."""
    state = nnx.state(Ernie(config, dtype))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def abstract_model(config: ModelConfig, dtype, layout: Layout) -> Ernie:
    """Make a model without weights whose abstract parameters say where each lies."""
    model = Ernie(config, dtype)
    nnx.update(model, shard_abstract(nnx.state(model), layout))
    return model


def initialize(model: Ernie, layout: Layout, seed: int = 0, scale: float = 0.02) -> None:
    """Fill an abstract model with random weights, drawn straight into the shards of a layout.

    The numbers are the same in every layout. Matrices are normal with standard deviation `scale`, norms one, biases
    (the routers' too) zero.
    """
    root = jax.random.key(seed)
    state = shard_abstract(nnx.state(model), layout)

    def draw(path, variable):
        value = variable.get_value()
        key = jax.random.fold_in(root, zlib.crc32(".".join(map(str, path)).encode()))
        make = _drawer(variable.get_metadata("init"), value.shape, value.dtype, value.sharding)
        return variable.replace(make(key, scale))

    filled = [(path, draw(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    nnx.update(model, nnx.from_flat_state(filled))


@functools.cache
def _drawer(kind: str, shape, dtype, sharding):
    """Compile one draw a shape: the 21B model has 334 parameters of a dozen shapes."""
    draws = {
        "normal": lambda key, scale: (jax.random.normal(key, shape, dtype) * scale).astype(dtype),
        "ones": lambda key, scale: jnp.ones(shape, dtype),
        "zeros": lambda key, scale: jnp.zeros(shape, dtype),
        "int8": lambda key, scale: jax.random.randint(key, shape, -127, 128, dtype),
        "int8 scale": lambda key, scale: jnp.full(shape, scale / math.sqrt((255**2 - 1) / 12), dtype),
        "fp8": lambda key, scale: jax.random.normal(key, shape, jnp.bfloat16).astype(dtype),
        "fp8 scale": lambda key, scale: jnp.full(shape, scale, dtype),
        "int4": lambda key, scale: _draw_int4(key, shape),
        "int4 scale": lambda key, scale: jnp.full(shape, scale / math.sqrt((15**2 - 1) / 12), dtype),
    }
    return jax.jit(draws[kind], out_shardings=sharding)


def _draw_int4(key, shape):
    """Draw numbers from -7 to 7, whose mean is zero."""
    low, high = jax.random.randint(key, (2, *shape), 1, 16, jnp.uint8)
    return low | high << 4
