"""Causal attention of steps with more than one new token a sequence, on Hopper GPUs: our kernel over the pages."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ernie_jax import kernels
from ernie_jax.errors import UserError
from ernie_jax.kernels import capability
from ernie_jax.ops.decode_attention import decode_problem
from ernie_jax.ops.pages import arrays

# Cached positions looked at together, and how many such blocks are in flight. From
# benchmarks/prefill_ops.py on an H200.
BLOCK, STEPS = 128, 2
_LEAST_BLOCK = 64  # of which pages must be a multiple
_TILE = 128  # queries of a tile


def takes_prefill(page_size: int) -> bool:
    """Tell whether the kernel runs on this process' GPUs with such pages; the reference computes prefill elsewhere."""
    return capability() == "9.0" and page_size % _LEAST_BLOCK == 0


def prefill(q, pages, batch, interpret=None):
    """Attend q [T, K, R, H] causally over the pages of `batch`, where the new keys and values are already written.

    Padding tokens come back finite. The softmax is float32.

    Args:
      interpret: parameters of Pallas' interpreter, for tests.

    Raises:
      UserError: if the backend does not take these shapes or dtypes.
    """
    if problem := decode_problem(q.shape[-1], q.dtype, pages.dtype):
        raise UserError(f"attention backend cuda {problem}; use attention backend xla")
    if pages.dtype != q.dtype:
        pages, batch = _widened(pages, batch, q.dtype)
    return _attend(q, pages, batch, interpret)


def _widened(pages, batch, dtype):
    """Write the pages in use as `dtype`, so that each byte becomes a number once for many queries.

    There is room for all pages, or for those in the table if these are fewer.

    Returns:
      The pages, and the batch with where they are now.
    """
    needed = batch.page_table.size
    out = jax.ShapeDtypeStruct((min(needed, len(pages)), *pages.shape[1:]), dtype)
    wide = kernels.call("ernie_widen_pages", out, batch.page_table, batch.kv_lengths, *arrays(pages))
    if needed < len(pages):
        table = jnp.arange(needed, dtype=jnp.int32).reshape(batch.page_table.shape)
        batch = dataclasses.replace(batch, page_table=table)
    return wide, batch


def _attend(q, pages, batch, interpret):
    """Cut each sequence into tiles of 128 queries, and attend those over the pages where they lie."""
    from ernie_jax.ops.prefill_kernel import attend_tiles  # Mosaic GPU, which only Hopper GPUs need

    tokens, kv_heads, group, head_dim = q.shape
    sequences, page_size = len(batch.kv_lengths), pages.shape[1]
    block = BLOCK if page_size % BLOCK == 0 else _LEAST_BLOCK
    flat = q.reshape(tokens, kv_heads * group, head_dim)
    if sequences == 1:
        # The tiles of one sequence lie where its tokens lie; those of padding look at one block, to come out finite.
        first = jnp.arange(-(-tokens // _TILE), dtype=jnp.int32) * _TILE
        flat = jnp.pad(flat, ((0, len(first) * _TILE - tokens), (0, 0), (0, 0)))
        row, live = jnp.zeros_like(first), first < batch.starts[1]
        position = jnp.where(live, batch.positions[0] + first, 0)
        blocks = jnp.where(live, -(-jnp.minimum(position + _TILE, batch.kv_lengths[0]) // block), 1)
    else:
        # Others' tokens are gathered: the kernel copies groups of 8 rows, and sequences begin anywhere. Behind the
        # barrier, indices are computed once for all layers, not for each number that moves.
        count = -(-jnp.diff(batch.starts) // _TILE)  # tiles of each sequence
        ends = jnp.cumsum(count)
        index = jnp.arange(tokens // _TILE + sequences, dtype=jnp.int32)
        row = jnp.minimum((ends <= index[:, None]).sum(1, dtype=jnp.int32), sequences - 1)
        before = (index - (ends - count)[row]) * _TILE  # tokens of the sequence in front of the tile
        source = (batch.starts[row] + before)[:, None] + jnp.arange(_TILE)
        source, place = jax.lax.optimization_barrier((source.reshape(-1), _places(batch, ends - count)))
        flat = flat.at[source].get(mode="clip")
        first = index * _TILE
        position = batch.positions[jnp.minimum(batch.starts[row], tokens - 1)] + before
        blocks = -(-jnp.minimum(position + _TILE, batch.kv_lengths[row]) // block)
        blocks = jnp.where(index < ends[-1], blocks, index == 0)  # the first tile is also what padding comes out as
    tiles = jnp.stack([first, position, blocks, row], axis=1).astype(jnp.int32)
    tiles = tiles[jnp.argsort(-blocks)]  # the longest first: no multiprocessor starts one when the others are done
    # XLA would hand over a slice of the step's integers where it lies; Mosaic takes multiples of 256 bytes only.
    table = jax.lax.optimization_barrier(batch.page_table)
    out = attend_tiles(flat, pages, table, tiles, block=block, steps=STEPS, interpret=interpret)
    if sequences == 1:
        return out[:tokens].reshape(q.shape)
    return out.at[place].get(mode="promise_in_bounds").reshape(q.shape)


def _places(batch, tiles):
    """Return where each token lies in the tiles, of which sequences have theirs from `tiles` on; padding: the first."""
    row = jnp.minimum(batch.rows, len(tiles) - 1)
    place = tiles[row] * _TILE + jnp.arange(len(row)) - batch.starts[row]
    return jnp.where(batch.rows < len(tiles), place, 0)
