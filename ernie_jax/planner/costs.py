"""Bytes, operations and exchanged bytes of a step, counted from the abstract model: what the hardware cannot avoid.

Everything is of the busiest device. Activations that stay on a device are left out; each weight and each cached key and
value is read once, of the routed experts only those that some token is expected to choose under even routing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from ernie_jax.config import ModelConfig
from ernie_jax.engine.cache import bytes_per_token
from ernie_jax.model import Ernie
from ernie_jax.ops import default_exchange_backend, form_of
from ernie_jax.planner.hlo import Collective, merge, sent_fraction
from ernie_jax.planner.topology import Topology
from ernie_jax.sharding import PRESETS, Layout


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter: its dotted name, shape, logical axes, and bytes of an element.

    Attributes:
      weights: how many an element of a matrix stands for: 2 where they are packed; 0 of scales and vectors.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    itemsize: int
    weights: int

    def local(self, layout: Layout) -> int:
        """Count the elements that a device holds."""
        return math.prod(self.shape) // math.prod(layout.size(axis) for axis in self.axes if axis is not None)


@functools.cache
def leaves(config: ModelConfig, dtype: jnp.dtype) -> tuple[Leaf, ...]:
    """List the parameters of a model."""
    flat = nnx.to_flat_state(nnx.state(Ernie(config, dtype)))
    return tuple(
        _leaf(".".join(map(str, path)), variable.get_value(), variable.get_metadata("axes")) for path, variable in flat
    )


def _leaf(name: str, value: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> Leaf:
    weights = 0 if name.endswith(".scale") or value.ndim == 1 else 2 if form_of(value.dtype) == "int4" else 1
    return Leaf(name, value.shape, axes, value.dtype.itemsize, weights)


def weight_bytes(config: ModelConfig, dtype: jnp.dtype, layout: Layout) -> int:
    """Return the bytes of the weights on a device."""
    return sum(leaf.local(layout) * leaf.itemsize for leaf in leaves(config, dtype))


def unused_bytes(config: ModelConfig, dtype: jnp.dtype, layout: Layout) -> int:
    """Return the bytes of weights that are loaded and take no part in a step: those of multi-token prediction."""
    return sum(leaf.local(layout) * leaf.itemsize for leaf in leaves(config, dtype) if leaf.name.startswith("mtp."))


def token_bytes(config: ModelConfig, kv_dtype: jnp.dtype, layout: Layout) -> int:
    """Return the bytes of a cached token on a device of the group that caches it."""
    return bytes_per_token(config, kv_dtype) // layout.size("kv_head")


@dataclasses.dataclass(frozen=True)
class Load:
    """What a step is given.

    Attributes:
      tokens: of all data groups.
      group_tokens: of the group with most.
      rows: sequences whose last token gets logits.
      cached: cached tokens that the busiest group attends to, those of this step included.
      attended: pairs of a token and a cached one that it attends to, in the busiest group.
    """

    tokens: int
    group_tokens: int
    rows: int
    cached: int
    attended: int


def decode_load(layout: Layout, batch: int, context: int) -> Load:
    """Return the load of `batch` sequences, each getting its token number `context`."""
    rows = -(-batch // layout.groups)
    return Load(batch, rows, batch, rows * context, rows * context)


def prefill_load(chunk: int, context: int) -> Load:
    """Return the load of the last `chunk` of `context` prompt tokens of one sequence."""
    start = context - chunk
    return Load(chunk, chunk, 1, context, chunk * start + chunk * (chunk + 1) // 2)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of weights and cache that a device moves in a step, and its operations."""

    weights: float
    cache: float
    flops: float


def step_cost(
    config: ModelConfig, dtype: jnp.dtype, layout: Layout, load: Load, kv_dtype: jnp.dtype | None = None
) -> Cost:
    """Count a step's bytes and operations on the busiest device.

    Args:
      kv_dtype: of the cache; default: `dtype`.
    """
    # Where tokens travel to the experts, everything else works on a shard's own tokens.
    tokens = load.group_tokens if PRESETS[layout.preset].exchanges else load.tokens
    moved = flops = 0.0
    for leaf in leaves(config, dtype):
        local = leaf.local(layout)
        if leaf.name.startswith("mtp.") or (leaf.name.startswith("embed.") and not config.tie_word_embeddings):
            continue  # not used, or a few rows of it
        if ".experts." in leaf.name:
            chosen = config.moe_k / config.moe_num_experts
            moved += local * leaf.itemsize * (1 - (1 - chosen) ** load.tokens)
            flops += 2 * local * leaf.weights * chosen * load.tokens
            continue
        moved += local * leaf.itemsize
        rows = load.rows if leaf.name.startswith(("embed.", "head.")) else tokens
        flops += 2 * local * leaf.weights * (load.group_tokens if ".attention." in leaf.name else rows)
    heads = config.num_attention_heads // layout.size("kv_head")
    flops += 4 * config.num_hidden_layers * heads * config.head_dim * load.attended
    cached = token_bytes(config, dtype if kv_dtype is None else kv_dtype, layout)
    return Cost(moved, (load.cached + load.group_tokens) * cached, flops)  # read, and the new ones written


def step_collectives(
    config: ModelConfig, dtype: jnp.dtype, layout: Layout, load: Load, platform: str
) -> list[Collective]:
    """List the collectives that a step is written with; the compiled program may differ.

    A ragged exchange counts the rows that travel under even routing. Equal ones are added up, largest total first.

    Args:
      platform: of the chips; it decides how an exchange is done.
    """
    shard, exchanges = layout.shard(), PRESETS[layout.preset].exchanges
    width = config.hidden_size * jnp.dtype(dtype).itemsize
    moe_layers = sum(config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    sums = {"vocab": ("vocab",), "attention": shard.attention_parts, "mlp": ("mlp",)}
    counts = {"vocab": 1, "attention": config.num_hidden_layers, "mlp": config.num_hidden_layers}
    if exchanges:
        sums["whole"], counts["whole"] = ("group",), 1
    found = [
        Collective("all-reduce", load.tokens * width, counts[name], shard.size(*logical))
        for name, logical in sums.items()
    ]
    if exchanges:
        shards = shard.size("expert")
        choices = shards * load.group_tokens * 2 * config.moe_k * 4  # int32 ids and float32 weights
        found.append(Collective("all-gather", choices, moe_layers, shards))
        if default_exchange_backend(platform) == "ragged":
            rows = round(load.group_tokens * _reached_shards(config, shards))
            found.append(Collective("ragged-all-to-all", rows * width, 2 * moe_layers, shards))
        else:
            found.append(Collective("all-to-all", shards * load.group_tokens * width, 2 * moe_layers, shards))
    return merge(item for item in found if item.group_size > 1 and item.count)


def _reached_shards(config: ModelConfig, shards: int) -> float:
    """Return how many shards hold any of a token's experts, expected under even routing."""
    experts, k = config.moe_num_experts, config.moe_k
    return shards * (1 - math.comb(experts - experts // shards, k) / math.comb(experts, k))


def link_bytes(items: Iterable[Collective], topology: Topology) -> float:
    """Return the bytes that a device sends to other chips.

    Where a chip has several devices, what they can settle among themselves first does not leave it.
    """
    per_chip = topology.chip.devices
    total = 0.0
    for item in items:
        if item.group_size % per_chip:
            total += item.link_bytes
        elif item.kind in ("all-to-all", "ragged-all-to-all"):
            total += item.count * item.bytes * (item.group_size - per_chip) / item.group_size
        else:
            total += item.count * item.bytes * sent_fraction(item.kind, item.group_size // per_chip) / per_chip
    return total


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds that a step takes on a device by each of three limits.

    Attributes:
      memory: bytes over the memory's bandwidth.
      compute: operations over the peak, dense bfloat16.
      links: bytes sent to other chips over the links' bandwidth, one direction.
      sent: those bytes.
    """

    memory: float
    compute: float
    links: float
    sent: float

    @property
    def seconds(self) -> float:
        """The largest of the three: a step whose parts overlap perfectly."""
        return max(self.memory, self.compute, self.links)

    @property
    def serial_seconds(self) -> float:
        """Their sum: a step in which nothing overlaps."""
        return self.memory + self.compute + self.links

    @property
    def bound(self) -> str:
        """The name of the largest."""
        return max(("memory", "compute", "links"), key=lambda name: getattr(self, name))


def roofline(cost: Cost, items: Iterable[Collective], topology: Topology) -> Roofline:
    """Hold a step's cost against a chip's peaks."""
    chip, sent = topology.chip, link_bytes(items, topology)
    return Roofline(
        (cost.weights + cost.cache) / chip.device_bandwidth,
        cost.flops / chip.device_flops,
        sent / topology.link_bandwidth if sent else 0.0,
        sent,
    )
