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
ALIGNMENT = 8  # tokens: the kernel copies groups of so many rows


def takes_prefill(page_size: int) -> bool:
    """Tell whether the kernel runs on this process' GPUs with such pages; the reference computes prefill elsewhere."""
    return capability() == "9.0" and page_size % _LEAST_BLOCK == 0


def prefill(q, pages, batch, interpret=None):
    """Attend q [T, K, R, H] causally over the pages of `batch`, where the new keys and values are already written.

    Padding tokens come back finite. The softmax is float32. Sequences must begin at multiples of ALIGNMENT tokens.

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
    """Cut each sequence, and the padding behind them, into tiles of 128 queries; attend those where they lie."""
    from ernie_jax.ops.prefill_kernel import attend_tiles  # Mosaic GPU, which only Hopper GPUs need

    tokens, kv_heads, group, head_dim = q.shape
    sequences, page_size = len(batch.kv_lengths), pages.shape[1]
    if sequences > 1 and batch.alignment % ALIGNMENT:
        raise ValueError(f"sequences must begin at multiples of {ALIGNMENT} tokens, not of {batch.alignment}")
    block = BLOCK if page_size % BLOCK == 0 else _LEAST_BLOCK
    rows = max(_aligned(tokens), _TILE)
    flat = jnp.pad(q.reshape(tokens, kv_heads * group, head_dim), ((0, rows - tokens), (0, 0), (0, 0)))
    starts = jnp.append(batch.starts[:-1], _aligned(batch.starts[-1:]))  # the last is that of padding
    sizes = jnp.append(_aligned(jnp.diff(batch.starts)), rows - starts[-1])
    count = -(-sizes // _TILE)
    ends = jnp.cumsum(count)
    index = jnp.arange(rows // _TILE + sequences + 1, dtype=jnp.int32)
    owner = jnp.minimum((ends <= index[:, None]).sum(1, dtype=jnp.int32), sequences)
    row = jnp.minimum(owner, sequences - 1)
    before = (index - (ends - count)[owner]) * _TILE  # tokens of the sequence in front of the tile
    first = starts[owner] + before
    position = jnp.where(owner < sequences, batch.positions[jnp.minimum(starts[row], tokens - 1)] + before, 0)
    blocks = -(-jnp.minimum(position + _TILE, batch.kv_lengths[row]) // block)
    blocks = jnp.where(owner < sequences, blocks, 1)  # padding looks at one, which any row has, to come out finite
    # A tile at the end begins so many rows earlier, which it does not write, as not to read beyond the last.
    skipped = jnp.maximum(first - (rows - _TILE), 0)
    written = skipped + jnp.minimum(sizes[owner] - before, _TILE)
    blocks = jnp.where(index < ends[-1], blocks, 0)
    tiles = [first - skipped, position - skipped, blocks, row, skipped, written]
    tiles = jnp.stack(tiles, axis=1).astype(jnp.int32)
    tiles = tiles[jnp.argsort(-tiles[:, 2])]  # the longest first: no multiprocessor starts one when the others are done
    # XLA would hand over a slice of the step's integers where it lies; Mosaic takes multiples of 256 bytes only.
    table = jax.lax.optimization_barrier(batch.page_table)
    out = attend_tiles(flat, pages, table, tiles, block=block, steps=STEPS, interpret=interpret)
    return out[:tokens].reshape(q.shape)


def _aligned(tokens):
    return -(-tokens // ALIGNMENT) * ALIGNMENT
