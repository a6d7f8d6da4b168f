"""Causal grouped-query attention over a paged cache; `packed` is that of training."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from ernie_jax.errors import UserError
from ernie_jax.ops.decode_attention import decode_attention, decode_problem
from ernie_jax.ops.pages import Pages, is_scaled, take, write
from ernie_jax.ops.precision import einsum
from ernie_jax.ops.prefill_attention import ALIGNMENT, prefill, takes_prefill

_BLOCK = 2048  # cached positions that one step of the online softmax looks at
_MASKED = -1e30  # finite, so that a fully masked row gives a finite (and unused) result instead of NaN


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions", "rows", "starts", "kv_lengths", "page_table"],
    meta_fields=["max_query", "decode", "alignment"],
)
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """Describe one step: T tokens of up to B sequences, of which each brings a run of new tokens.

    Sequence b brings the tokens starts[b] to starts[b + 1]; one decode token or a prefill chunk, mixed at will. Padding
    tokens have row B. Of sharded steps this describes one data group.

    Attributes:
      positions: [T] int32 position in the sequence.
      rows: [T] int32 which sequence.
      starts: [B + 1] int32 first token of each sequence.
      kv_lengths: [B] int32 cached tokens including those of this step.
      page_table: [B, M] int32 pages of each sequence in order; the last page, P - 1, where there is none: it belongs to
        no sequence, and padding tokens may write there.
      max_query: static; no sequence brings more new tokens than this.
      decode: static; the first so many tokens are of the first so many sequences, one each, or padding. 0: not known.
      alignment: static; behind those a sequence begins at a multiple of so many tokens, so that the last up to
        starts[b + 1] may be padding.
    """

    positions: jax.Array
    rows: jax.Array
    starts: jax.Array
    kv_lengths: jax.Array
    page_table: jax.Array
    max_query: int
    decode: int = 0
    alignment: int = 1

    def split(self) -> tuple[RaggedBatch, RaggedBatch]:
        """Return the leading part with one token a sequence, and the rest."""
        n = self.decode
        return (
            RaggedBatch(
                self.positions[:n],
                jnp.minimum(self.rows[:n], n),
                self.starts[: n + 1],
                self.kv_lengths[:n],
                self.page_table[:n],
                max_query=1,
            ),
            RaggedBatch(
                self.positions[n:],
                self.rows[n:] - n,
                self.starts[n:] - n,
                self.kv_lengths[n:],
                self.page_table[n:],
                max_query=self.max_query,
                alignment=self.alignment,
            ),
        )


def paged_attention(
    q: jax.Array,  # [T, K, R, H]
    k: jax.Array,  # [T, K, H]
    v: jax.Array,  # [T, K, H]
    pages: Pages,  # [P, page_size, 2K, H]
    batch: RaggedBatch,
    backend: str = "xla",
) -> tuple[jax.Array, Pages]:
    """Write the new keys and values into their pages, then attend causally over each sequence's pages.

    Pages hold k and v interleaved by head: k0, v0, k1, v1, ... The softmax is float32. What pages round off is seen by
    no query, not even of the same step. Rows of padding tokens come back undefined but finite, and write to no page but
    the last, which belongs to no sequence.

    Args:
      backend: a name of ATTENTION_BACKENDS.

    Returns:
      out [T, K, R, H] in the dtype of `q`, and the updated pages.

    Raises:
      UserError: if the backend does not take these shapes or dtypes.
    """
    if batch.decode:
        first, rest = batch.split()
        out, pages = paged_attention(*(x[: batch.decode] for x in (q, k, v)), pages, first, backend)
        out, pages = jax.lax.optimization_barrier((out, pages))  # all is read before the rest is written, in place
        more, pages = paged_attention(*(x[batch.decode :] for x in (q, k, v)), pages, rest, backend)
        return jnp.concatenate([out, more]), pages
    if backend == "cuda" and batch.max_query == 1:
        return decode_attention(jnp.concatenate([q, k[:, :, None], v[:, :, None]], axis=2), None, pages, batch)
    pages = _write(k, v, pages, batch)
    return ATTENTION_BACKENDS[backend](q, pages, batch), pages


@dataclasses.dataclass(frozen=True)
class PagedAttention:
    """Attend over the pages of a step: what a layer is handed."""

    batch: RaggedBatch
    backend: str

    def __call__(self, q, k, v, pages):
        return paged_attention(q, k, v, pages, self.batch, self.backend)

    @property
    def takes_unrotated(self) -> bool:
        """Tell whether `rotating` is there."""
        return self.backend == "cuda" and self.batch.max_query == 1

    def rotating(self, qkv, angles, pages):
        """Rotate the queries and the key of qkv [T, K, R + 2, H] by angles [T, H / 2], and attend, in one kernel."""
        return decode_attention(qkv, angles, pages, self.batch)


def default_attention_backend(
    platform: str, head_dim: int, dtype: jnp.dtype, kv_heads: int, kv_dtype: jnp.dtype | None = None
) -> str:
    """Choose a backend: on TPUs and GPUs the kernel, where it takes the model's heads and the pages.

    Args:
      kv_heads: key/value heads of one shard.
      kv_dtype: of the pages; default: `dtype`, that of the heads.
    """
    kernel = {"tpu": "rpa", "gpu": "cuda"}.get(platform)
    return kernel if kernel and _problem(kernel, head_dim, dtype, kv_heads, kv_dtype) is None else "xla"


def check_attention_backend(
    backend: str, head_dim: int, dtype: jnp.dtype, kv_heads: int, kv_dtype: jnp.dtype | None = None
) -> None:
    """Check that a backend takes a model's heads; arguments as in `default_attention_backend`.

    Raises:
      UserError: if it does not.
    """
    if problem := _problem(backend, head_dim, dtype, kv_heads, kv_dtype):
        raise UserError(f"attention backend {backend} {problem}; use attention backend xla")


class StepNeeds(NamedTuple):
    """What a backend asks of the static shape of a step.

    Attributes:
      pads: all runs of a step are padded to `max_query`, so that a tight one saves work.
      splits: `decode` must be known where sequences with one token come with others.
      alignment: of a batch.
    """

    pads: bool
    splits: bool
    alignment: int


def step_needs(backend: str, page_size: int) -> StepNeeds:
    """Return what a backend asks of steps over such pages."""
    tiles = backend == "cuda" and takes_prefill(page_size)
    return StepNeeds(backend != "rpa" and not tiles, backend != "rpa", ALIGNMENT if tiles else 1)


def _problem(backend, head_dim, dtype, kv_heads, kv_dtype):
    """Say what a backend does not take of a model's heads and pages, if anything."""
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    if backend == "rpa":
        return _rpa_problem(head_dim, dtype, kv_heads, kv_dtype)
    return decode_problem(head_dim, dtype, kv_dtype) if backend == "cuda" else None


def _write(k, v, pages, batch):
    """Scatter the new keys and values [T, K, H] into pages, in place if those are donated."""
    page_size = pages.shape[1]
    tokens, kv_heads, head_dim = k.shape
    table = jnp.pad(batch.page_table, ((0, 1), (0, 0)), constant_values=len(pages) - 1)  # row of padding tokens
    page = table[batch.rows, batch.positions // page_size]
    new = jnp.stack([k, v], axis=2).reshape(tokens, 2 * kv_heads, head_dim)
    slot = batch.positions % page_size
    if tokens == 1:
        # XLA makes a single write a dynamic-update-slice, for which a TPU changes the layout of the whole cache and
        # back; a second one, which is dropped, keeps it a scatter.
        page = jnp.pad(page, (0, 1), constant_values=len(pages) - 1)
        slot, new = jnp.tile(slot, 2), jnp.tile(new, (2, 1, 1))
    # Padding gets places beyond the pages, all different, and is dropped: of places that may be equal, GPUs' XLA writes
    # each number by a loop of compare-and-swap.
    page = jnp.where(page < len(pages) - 1, page, len(pages) + jnp.arange(len(page)))
    # Without the barrier XLA may fuse the write into the reads that follow, and then copies the whole cache first.
    return jax.lax.optimization_barrier(write(pages, page, slot, new))


def _xla(q, pages, batch):
    """The reference: ragged queries padded to [B, Q], which trades arithmetic for a simple layout."""
    tokens, sequences = len(q), len(batch.kv_lengths)
    offsets = jnp.arange(batch.max_query)
    source = jnp.minimum(batch.starts[:-1, None] + offsets, tokens - 1)  # [B, Q]
    out = _attend_pages(q[source], pages, batch.page_table, batch.positions[source], batch.kv_lengths)
    row = jnp.minimum(batch.rows, sequences - 1)
    offset = jnp.clip(jnp.arange(tokens) - batch.starts[row], 0, batch.max_query - 1)
    return out[row, offset]


def _attend_pages(q, pages, table, positions, lengths):
    """Attend padded queries [B, Q, K, R, H] over pages, a block of pages at a time with an online softmax."""
    _, page_size, kv_heads, head_dim = (*pages.shape[:2], pages.shape[2] // 2, pages.shape[3])
    sequences, queries, _, group, _ = q.shape
    block_pages = min(table.shape[1], max(1, _BLOCK // page_size))
    blocks = -(-table.shape[1] // block_pages)
    table = jnp.pad(table, ((0, 0), (0, blocks * block_pages - table.shape[1])))
    table = table.reshape(sequences, blocks, block_pages)
    limit = jnp.minimum(positions, lengths[:, None] - 1)  # [B, Q] last position that a query sees

    def step(carry, block):
        maximum, total, out = carry
        index, ids = block
        kv, scales = take(pages, ids)
        kv = kv.astype(q.dtype)  # of int8, whose scales factor out of both products, every number is one of bfloat16
        scores = einsum("bqkrh,bskh->bkrqs", q, kv[:, :, :, 0], jnp.float32) * head_dim**-0.5
        if scales is not None:
            scores *= scales[:, :, 0, None, None]
        cached = index * block_pages * page_size + jnp.arange(block_pages * page_size)
        scores = jnp.where((cached <= limit[:, :, None])[:, None, None], scores, _MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(-1))
        weights = jnp.exp(scores - new_maximum[..., None])
        rescale = jnp.exp(maximum - new_maximum)
        total = total * rescale + weights.sum(-1)
        if scales is not None:
            weights *= scales[:, :, 1, None, None]
        values = einsum("bkrqs,bskh->bkrqh", weights.astype(q.dtype), kv[:, :, :, 1], jnp.float32)
        return (new_maximum, total, out * rescale[..., None] + values), None

    rows = (sequences, kv_heads, group, queries)
    carry = (jnp.full(rows, _MASKED), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))
    if blocks == 1:
        carry, _ = step(carry, (0, table[:, 0]))
    else:
        carry, _ = jax.lax.scan(step, carry, (jnp.arange(blocks), jnp.moveaxis(table, 1, 0)))
    _, total, out = carry
    return jnp.moveaxis(out / total[..., None], 3, 1).astype(q.dtype)  # [B, Q, K, R, H]


def _rpa(q, pages, batch):
    """JAX's TPU kernel: a block of queries at a time over those of a sequence's pages that are in use."""
    tokens, kv_heads, group, head_dim = q.shape
    check_attention_backend("rpa", head_dim, q.dtype, kv_heads, pages.dtype)
    _, page_size, _, _ = pages.shape
    sequences, width = batch.page_table.shape
    # Up to 1,024 cached positions at a time: two such buffers, and the scores of 32 queries of a key/value head, stay
    # within the 16 MiB of vector memory that a kernel gets on the smallest chips. JAX's own table knows no compile-only
    # chips; where it lists heads like these, on v5e and v6e, it has 32 queries and mostly 1,024 positions too.
    positions = min(1024, 8192 // (kv_heads * max(2, pages.dtype.itemsize)))  # 8 bits are widened there
    widened = 1.0 if pages.dtype.itemsize == 1 else None  # with a scale the kernel turns what it reads into q's dtype
    live = jnp.sum(batch.kv_lengths > 0, dtype=jnp.int32)
    # The kernel starts to read the first sequence in any case, and must wait for it: a step without one reads scratch.
    idle = live == 0
    out = ragged_paged_attention(
        q.reshape(tokens, kv_heads * group, head_dim),
        pages,
        jnp.where(idle, 1, batch.kv_lengths),
        batch.page_table,
        jnp.where(idle, jnp.minimum(jnp.arange(sequences + 1, dtype=jnp.int32), 1), batch.starts),
        jnp.maximum(live, 1)[None],
        sm_scale=head_dim**-0.5,
        k_scale=widened,
        v_scale=widened,
        num_kv_pages_per_block=min(width, max(1, positions // page_size)),
        num_queries_per_block=min(tokens, 32),
    ).reshape(q.shape)
    # It leaves rows without a sequence as they were in memory, perhaps NaN.
    return jnp.where((batch.rows < sequences)[:, None, None, None], out, 0)


def _rpa_problem(head_dim: int, dtype: jnp.dtype, kv_heads: int, kv_dtype: jnp.dtype) -> str | None:
    """Say what the kernel does not take, if anything."""
    if head_dim % 128:
        return f"takes heads of a multiple of 128, not of {head_dim}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32 heads, not {jnp.dtype(dtype).name}"
    if is_scaled(kv_dtype):
        return "takes one scale for all pages, not int8's for each token and head"
    if kv_dtype not in (dtype, jnp.float8_e4m3fn):
        name = jnp.dtype(dtype).name
        return f"takes {name} or fp8 pages of {name} heads, not {jnp.dtype(kv_dtype).name}"
    if jnp.dtype(kv_dtype).itemsize == 1 and kv_heads == 1:
        return "takes 2 or more key/value heads a shard with an 8-bit cache, not 1"
    if 8 % kv_heads and kv_heads % 8:
        return f"takes 1, 2, 4 or a multiple of 8 key/value heads a shard, not {kv_heads}"
    return None


def _cuda(q, pages, batch):
    return prefill(q, pages, batch) if takes_prefill(pages.shape[1]) else _xla(q, pages, batch)


# Attention over pages that hold the new keys and values already; a decode step of "cuda" is one kernel with the write.
ATTENTION_BACKENDS = {"xla": _xla, "rpa": _rpa, "cuda": _cuda}
