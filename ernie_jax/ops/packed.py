"""Causal grouped-query attention over packed rows, for training: documents in one row never see each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention

from ernie_jax import kernels
from ernie_jax.errors import UserError
from ernie_jax.ops.kept import KEPT
from ernie_jax.ops.precision import einsum

# Of "xla", tokens of a row whose scores are held all at once; of longer ones, parts that see ever more of the row, and
# queries that are done at a time.
_WHOLE_ROW, _PARTS, _QUERIES = 1024, 8, 256
_MASKED = -1e30  # finite, so that a fully masked row gives a finite (and unused) result instead of NaN


def packed_attention(
    q: jax.Array,  # [B, T, K, R, H]
    k: jax.Array,  # [B, T, K, H]
    v: jax.Array,  # [B, T, K, H]
    segments: jax.Array,  # [B, T] int32
    backend: str = "xla",
) -> jax.Array:
    """Attend causally within segments, each of which is one run of positions. The softmax is float32.

    Args:
      backend: a name of PACKED_ATTENTION_BACKENDS.

    Returns:
      [B, T, K, R, H] in the dtype of `q`.

    Raises:
      UserError: if the backend does not take these shapes or dtypes.
    """
    return PACKED_ATTENTION_BACKENDS[backend](q, k, v, segments)


def default_packed_backend(platform: str, head_dim: int, dtype: jnp.dtype, length: int) -> str:
    """Choose a backend for rows of some length: on TPUs and Hopper GPUs the kernels, where they take the heads."""
    kernel = {"tpu": "splash", "gpu": "mosaic"}.get(platform)
    return kernel if kernel and packed_problem(kernel, head_dim, dtype, length) is None else "xla"


def packed_problem(backend: str, head_dim: int, dtype: jnp.dtype, length: int) -> str | None:
    """Say what a backend does not take of heads and rows, or of the GPU, if anything."""
    if backend == "xla":
        return None
    if head_dim != 128:
        return f"takes heads of 128, not of {head_dim}"
    if length % 128:
        return f"takes rows of a multiple of 128 tokens, not of {length}"
    if backend == "splash":
        return None
    if dtype != jnp.bfloat16:
        return f"takes bfloat16 heads, not {jnp.dtype(dtype).name}"
    if kernels.capability() != "9.0":
        return f"is for GPUs of compute capability 9.0, not {kernels.capability()}"
    return None


def _xla(q, k, v, segments):
    """The reference: of long rows a block of queries at a time, over the keys up to the end of its eighth of the row.

    It is done again for the gradient: scores of T x T are never held.
    """
    length = q.shape[1]
    if length <= _WHOLE_ROW:
        return _attend_rows(q, k, v, segments, segments, 0)
    part = -(-length // (_PARTS * _QUERIES)) * _QUERIES
    k, v = (x.astype(jnp.float32) for x in (k, v))  # so that their gradients are added up in float32
    return jnp.concatenate(
        [
            _attend_part(q[:, first : first + part], k, v, segments, first, min(first + part, length))
            for first in range(0, length, part)
        ],
        axis=1,
    )


def _attend_part(q, k, v, segments, first, end):
    """Attend the queries of positions `first` to `end` over the keys before `end`."""
    k, v, keys = k[:, :end], v[:, :end], segments[:, :end]
    more = -(end - first) % _QUERIES
    q = jnp.pad(q, ((0, 0), (0, more), *((0, 0),) * 3))
    queries = jnp.pad(segments[:, first:end], ((0, 0), (0, more)), constant_values=-1)

    @jax.checkpoint
    def block(start):
        mine, own = (jax.lax.dynamic_slice_in_dim(x, start, _QUERIES, 1) for x in (q, queries))
        return _attend_rows(mine, k.astype(q.dtype), v.astype(q.dtype), own, keys, first + start)

    out = jax.lax.map(block, jnp.arange(0, q.shape[1], _QUERIES))  # [blocks, B, _QUERIES, K, R, H]
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)[:, : end - first]


def _attend_rows(q, k, v, queries, keys, first):
    """Attend queries, of which the first is at position `first`, to keys; both are given with their segments."""
    scores = einsum("bqkrh,bskh->bkrqs", q, k, jnp.float32) * q.shape[-1] ** -0.5
    before = first + jnp.arange(q.shape[1])[:, None] >= jnp.arange(k.shape[1])
    visible = before & (queries[:, :, None] == keys[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _MASKED), axis=-1)
    return einsum("bkrqs,bskh->bqkrh", weights.astype(q.dtype), v)


def _mosaic(q, k, v, segments):
    """Our kernels, which look at no block of a row that none of a tile's documents is in."""
    _check("mosaic", q)
    rows, length, kv_heads, group, head_dim = q.shape
    first, last = _bounds(segments)
    return _attend(q.reshape(rows, length, kv_heads * group, head_dim), k, v, first, last).reshape(q.shape)


def _check(backend, q):
    if problem := packed_problem(backend, q.shape[-1], q.dtype, q.shape[1]):
        raise UserError(f"attention backend {backend} {problem}; use attention backend xla")


def _bounds(segments):
    """Return the first and the last position of each position's segment, both [B, T] int32."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    changes = segments[:, 1:] != segments[:, :-1]
    begins, ends = (jnp.pad(changes, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1)))
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    return first, jax.lax.cummin(jnp.where(ends, index, segments.shape[1]), axis=1, reverse=True)


@jax.custom_vjp
def _attend(q, k, v, first, last):
    return _forward(q, k, v, first, last)[0]


def _forward(q, k, v, first, last):
    from ernie_jax.ops import packed_kernel  # Mosaic GPU, which only Hopper GPUs need

    out, sums = (checkpoint_name(x, KEPT.attention) for x in packed_kernel.attend(q, k, v, first))
    return out, (q, k, v, first, last, out, sums)


def _backward(residuals, gradient):
    from ernie_jax.ops import packed_kernel

    q, k, v, first, last, out, sums = residuals
    products = einsum("bqnh,bqnh->bnq", out.astype(jnp.float32), gradient.astype(jnp.float32))
    given = gradient, sums, products
    of_keys = packed_kernel.pull_keys(q, k, v, last, *given)
    return packed_kernel.pull_queries(q, k, v, first, *given), *of_keys, None, None


_attend.defvjp(_forward, _backward)


def _splash(q, k, v, segments, interpret=False):
    """JAX's TPU kernels, which go by blocks of the causal mask."""
    _check("splash", q)
    rows, length, kv_heads, group, head_dim = q.shape
    block = max(size for size in (128, 256, 512) if length % size == 0)
    attend = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * (kv_heads * group)),
        block_sizes=splash_attention.BlockSizes(
            block, block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        residual_checkpoint_name=KEPT.attention,
        interpret=interpret,
    )

    def row(q, k, v, segments):
        q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)  # it does not scale
        return attend(q, k, v, segment_ids=splash_attention.SegmentIds(segments, segments))

    q, k, v = (x.reshape(rows, length, -1, head_dim).swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(row)(q, k, v, segments).swapaxes(1, 2).reshape(rows, length, kv_heads, group, head_dim)


PACKED_ATTENTION_BACKENDS = {"xla": _xla, "mosaic": _mosaic, "splash": _splash}
