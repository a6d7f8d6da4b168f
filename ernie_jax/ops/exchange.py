"""Exchange of tokens between shards that hold different experts, inside `jax.shard_map`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# (rows [R, D], chosen [R, k] int32, weights [R, k]) -> [R, D]
Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def exchange_mlp(
    x: jax.Array,  # [T, D]
    chosen: jax.Array,  # [T, k] int32
    weights: jax.Array,  # [T, k]
    compute: Compute,
    *,
    axes: tuple[str, ...],
    experts_per_shard: int,
    backend: str,
) -> jax.Array:
    """Send this shard's tokens to the shards of their experts, and add up what those return.

    A token goes once to each shard that has any of its experts and comes back as one row, the sum over that shard's
    experts rounded to the dtype of `x`; the rows of a token are added in float32. No token is ever dropped: every shard
    has room for all tokens of all shards. Three collectives: an all-gather of the choices and weights (from which each
    shard computes every offset and size), and one all-to-all each way.

    Args:
      chosen: ids over all shards, of which shard i along `axes` has those from i * experts_per_shard on. A token
        without an id in range (padding) is sent nowhere, and its result is zero.
      compute: applies this shard's experts to R rows; ids of others contribute nothing, and some rows have no others.
      axes: mesh axes, the first outermost.
      backend: a name of EXCHANGE_BACKENDS.

    Returns:
      [T, D] in the dtype of `x`.
    """
    tokens, k = chosen.shape
    shards, me = math.prod(jax.lax.axis_size(axis) for axis in axes), jax.lax.axis_index(axes)
    bits = jax.lax.bitcast_convert_type(weights.astype(jnp.float32), jnp.int32)
    everyone = jax.lax.all_gather(jnp.concatenate([chosen, bits], axis=1), axes)  # [N, T, 2k]
    all_chosen, bits = everyone[..., :k], everyone[..., k:]
    shard = jnp.where(
        (all_chosen >= 0) & (all_chosen < shards * experts_per_shard), all_chosen // experts_per_shard, -1
    )
    # Of several choices on one shard only the first counts.
    repeated = (shard[..., :, None] == shard[..., None, :]) & jnp.tri(k, k=-1, dtype=bool)
    shard = jnp.where(repeated.any(-1), -1, shard)  # [N, T, k]
    sizes = jnp.sum(shard[..., None] == jnp.arange(shards), axis=(1, 2), dtype=jnp.int32)  # [source, destination]
    layout = EXCHANGE_BACKENDS[backend].layout(sizes, tokens, k)

    to = shard[me]  # [T, k]
    sent = (to[..., None] == jnp.arange(shards)).any(1)  # [T, N]
    rank = jnp.take_along_axis(_rank(sent, 0), to, axis=1)
    slot = jnp.where(to >= 0, layout.sent[me, to] + rank, layout.most_sent)  # [T, k]
    token = jnp.full(layout.most_sent, tokens).at[slot].set(jnp.arange(tokens)[:, None], mode="drop")
    rows = x.at[token].get(mode="fill", fill_value=0)

    received = (shard == me).any(-1)  # [N, T]
    place = jnp.where(received, layout.received[:, me, None] + _rank(received, 1), layout.most_received)
    origin = (
        jnp.full(layout.most_received, shards * tokens)
        .at[place.reshape(-1)]
        .set(jnp.arange(shards * tokens), mode="drop")
    )
    row_chosen = all_chosen.reshape(-1, k).at[origin].get(mode="fill", fill_value=-1)
    row_bits = bits.reshape(-1, k).at[origin].get(mode="fill", fill_value=0)
    row_weights = jax.lax.bitcast_convert_type(row_bits, jnp.float32).astype(weights.dtype)

    move = EXCHANGE_BACKENDS[backend].move
    there = layout.sent[me], layout.received[me], sizes[me], sizes[:, me]
    back = layout.received[:, me], layout.sent[:, me], sizes[:, me], sizes[me]
    with jax.named_scope("dispatch"):
        rows = move(rows, layout.most_received, *there, axes)
    rows = compute(rows, row_chosen, row_weights)
    with jax.named_scope("combine"):
        rows = move(rows, layout.most_sent, *back, axes)
    return rows.at[slot].get(mode="fill", fill_value=0).astype(jnp.float32).sum(1).astype(x.dtype)


def default_exchange_backend(platform: str) -> str:
    """Choose a backend: only TPUs are known to move a ragged exchange faster than a padded one."""
    return "ragged" if platform == "tpu" else "padded"


def _rank(member: jax.Array, axis: int) -> jax.Array:
    """Count the members before each."""
    return jnp.cumsum(member, axis=axis, dtype=jnp.int32) - member


class _Layout(NamedTuple):
    """Where the rows for each pair of shards start: in the source's buffer, and in the destination's.

    Attributes:
      sent, received: [N source, N destination] int32.
      most_sent, most_received: static sizes of those buffers.
    """

    sent: jax.Array
    received: jax.Array
    most_sent: int
    most_received: int


class _Backend(NamedTuple):
    """How rows lie in buffers, and how they move.

    Attributes:
      layout: (sizes [N, N], T, k) -> _Layout.
      move: (rows, number of rows of the result, and for each other shard [N]: offset of what goes there, offset at
        which it arrives there, its size, size of what comes from there; axes) -> rows.
    """

    layout: Callable[[jax.Array, int, int], _Layout]
    move: Callable[..., jax.Array]


def _padded_layout(sizes, tokens, k):
    shards = len(sizes)
    starts = jnp.arange(shards, dtype=jnp.int32) * tokens
    by_destination = jnp.broadcast_to(starts, sizes.shape)
    return _Layout(by_destination, by_destination.T, shards * tokens, shards * tokens)


def _padded_move(rows, most, start, there, size, coming, axes):
    """Move as many rows between any two shards as there could ever be."""
    return jax.lax.all_to_all(rows, axes, 0, 0, tiled=True)


def _ragged_layout(sizes, tokens, k):
    shards = len(sizes)
    return _Layout(_before(sizes, 1), _before(sizes, 0), tokens * min(k, shards), tokens * shards)


def _ragged_move(rows, most, start, there, size, coming, axes):
    """Move the rows there are. Not implemented by XLA on CPUs."""
    out = jnp.zeros((most, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, out, start, size, there, coming, axis_name=axes)


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(sizes, axis=axis, dtype=jnp.int32) - sizes


EXCHANGE_BACKENDS = {
    "padded": _Backend(_padded_layout, _padded_move),
    "ragged": _Backend(_ragged_layout, _ragged_move),
}
