"""Causal attention of steps with more than one new token a sequence, on GPUs: our kernel on Hopper, cuDNN elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.errors import UserError
from ernie_jax.ops.decode_attention import decode_problem
from ernie_jax.ops.mosaic import capability

# Of "mosaic": cached positions looked at together, and how many such blocks are in flight. From
# benchmarks/prefill_ops.py on an H200.
BLOCK, STEPS = 128, 2
_LEAST_BLOCK = 64  # which pages must be a multiple of
_TILE = 128  # queries of a tile
_ROUTES = {"9.0": "mosaic"}  # by compute capability; "cudnn" where it is not listed


def prefill(q, pages, batch, route=None, interpret=None):
    """Attend q [T, K, R, H] causally over the pages of `batch`, where the new keys and values are already written.

    Padding tokens come back finite. The softmax is float32.

    Args:
      route: "mosaic" or "cudnn"; None chooses.
      interpret: parameters of Pallas' interpreter, for tests of "mosaic".

    Raises:
      UserError: if the backend does not take these shapes or dtypes.
    """
    if problem := decode_problem(q.shape[-1], pages.dtype):
        raise UserError(f"attention backend cuda {problem}; use attention backend xla")
    route = route or (_ROUTES.get(capability(), "cudnn") if pages.shape[1] % _LEAST_BLOCK == 0 else "cudnn")
    q, dtype = q.astype(pages.dtype), q.dtype
    out = _mosaic(q, pages, batch, interpret) if route == "mosaic" else _cudnn(q, pages, batch)
    return out.astype(dtype)


def _mosaic(q, pages, batch, interpret):
    """Cut each sequence into tiles of 128 queries, and attend those over the pages where they lie."""
    from ernie_jax.ops.prefill_kernel import attend_tiles  # Mosaic GPU, which only Hopper GPUs need

    tokens, kv_heads, group, head_dim = q.shape
    sequences, page_size = len(batch.kv_lengths), pages.shape[1]
    block = BLOCK if page_size % BLOCK == 0 else _LEAST_BLOCK
    flat = jnp.pad(q.reshape(tokens, kv_heads * group, head_dim), ((0, max(0, _TILE - tokens)), (0, 0), (0, 0)))
    if sequences == 1:
        # The tiles of one sequence lie where its tokens lie; those of padding look at one block, to come out finite.
        first = jnp.arange(-(-tokens // _TILE), dtype=jnp.int32) * _TILE
        row, target, out_rows = jnp.zeros_like(first), first, len(flat)
        live = first < batch.starts[1]
        position = jnp.where(live, batch.positions[0] + first, 0)
        blocks = jnp.where(live, -(-jnp.minimum(position + _TILE, batch.kv_lengths[0]) // block), 1)
    else:
        count = -(-jnp.diff(batch.starts) // _TILE)  # tiles of each sequence
        ends = jnp.cumsum(count)
        index = jnp.arange(tokens // _TILE + sequences, dtype=jnp.int32)
        row = jnp.minimum((ends <= index[:, None]).sum(1, dtype=jnp.int32), sequences - 1)
        before = (index - (ends - count)[row]) * _TILE  # tokens of the sequence in front of the tile
        first, target, out_rows = batch.starts[row] + before, index * _TILE, len(index) * _TILE
        position = batch.positions[jnp.minimum(batch.starts[row], tokens - 1)] + before
        blocks = -(-jnp.minimum(position + _TILE, batch.kv_lengths[row]) // block)
        blocks = jnp.where(index < ends[-1], blocks, 0)
    tiles = jnp.stack([first, target, position, blocks, row], axis=1).astype(jnp.int32)
    tiles = tiles[jnp.argsort(-blocks)]  # the longest first: no multiprocessor starts one when the others are done
    out = attend_tiles(flat, pages, batch.page_table, tiles, out_rows, block=block, steps=STEPS, interpret=interpret)
    if sequences == 1:
        return out[:tokens].reshape(q.shape)
    row = jnp.minimum(batch.rows, sequences - 1)
    place = (ends - count)[row] * _TILE + jnp.arange(tokens) - batch.starts[row]
    place = jnp.where(batch.rows < sequences, place, out_rows)
    return out.at[place].get(mode="fill", fill_value=0).reshape(q.shape)


def _cudnn(q, pages, batch):
    """Attend each chunk over itself and, if any sequence has more, over what was cached before; merge by their sums."""
    tokens, kv_heads, group, head_dim = q.shape
    sequences, width = batch.page_table.shape
    page_size, queries = pages.shape[1], batch.max_query
    flat = q.reshape(tokens, kv_heads * group, head_dim)
    plain = sequences == 1 and queries == tokens
    source = jnp.minimum(batch.starts[:-1, None] + jnp.arange(queries), tokens - 1)  # [B, Q]
    padded = flat[None] if plain else flat[source]
    lengths = jnp.diff(batch.starts).astype(jnp.int32)
    cached = (batch.kv_lengths - lengths).astype(jnp.int32)  # before this step
    position = jnp.minimum(cached[:, None] + jnp.arange(queries), width * page_size - 1)
    page = jnp.take_along_axis(batch.page_table, position // page_size, axis=1)
    own, own_sum = _attend(padded, pages[page, position % page_size], lengths, lengths, True)

    def merge():
        every = pages[batch.page_table].reshape(sequences, width * page_size, 2 * kv_heads, head_dim)
        other, other_sum = _attend(padded, every, lengths, cached, False)
        has = (cached > 0)[:, None, None, None]
        share = jnp.where(has, jax.nn.sigmoid(other_sum - own_sum)[..., None], 0)  # of what was cached
        return (own * (1 - share) + jnp.where(has, other, 0) * share).astype(own.dtype)

    out = jax.lax.cond(jnp.any(cached > 0), merge, lambda: own)
    if plain:
        return out[0].reshape(q.shape)
    row = jnp.minimum(batch.rows, sequences - 1)
    offset = jnp.clip(jnp.arange(tokens) - batch.starts[row], 0, queries - 1)
    out = jnp.where((batch.rows < sequences)[:, None, None], out[row, offset], 0)
    return out.reshape(q.shape)


def _attend(q, kv, q_lengths, kv_lengths, causal):
    """Return cuDNN's attention [B, Q, N, H] of q over kv [B, S, 2K, H], and the log of its sums [B, Q, N] float32."""
    # jax.nn.dot_product_attention rounds the sums to bfloat16, three digits, before it returns them.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    out, sums = dot_product_attention(
        q,
        kv[:, :, 0::2],
        kv[:, :, 1::2],
        q_seqlen=q_lengths,
        kv_seqlen=kv_lengths,
        scale=q.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
        return_residual=True,
    )
    return out, jnp.moveaxis(sums, 1, 2)
