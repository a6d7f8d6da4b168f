"""The "cuda" backend's decode step: our own GPU kernel, which reads the cache once and at full width."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax import kernels
from ernie_jax.errors import UserError
from ernie_jax.ops.pages import Pages, arrays, described, rebuilt

_MOST_TOKENS = 2048  # of a call, as in kernels/attention.cuh
_BLOCKS = 512  # with a partial result each
_PITCH = 132  # floats of one: its dims, maximum and sum, and two to keep it aligned


def decode_problem(
    head_dim: int, dtype: jnp.dtype, kv_dtype: jnp.dtype, group: int = 1, page_size: int = 16
) -> str | None:
    """Say what the kernel does not take, if anything."""
    if head_dim != 128:
        return f"takes heads of 128, not of {head_dim}"
    if dtype != jnp.bfloat16:
        return f"takes bfloat16 heads, not {jnp.dtype(dtype).name}"
    if kv_dtype not in (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
        return f"takes bfloat16, int8 or fp8 pages, not {jnp.dtype(kv_dtype).name}"
    if group > 16:
        return f"takes up to 16 query heads a key/value head, not {group}"
    if page_size % 16:
        return f"takes pages of a multiple of 16 tokens, not of {page_size}"
    return None


def decode_attention(
    qkv: jax.Array,  # [T, K, R + 2, H]
    angles: jax.Array | None,  # [T, H / 2] float32
    pages: Pages,
    batch,
) -> tuple[jax.Array, Pages]:
    """Do what `paged_attention` does for a step of at most one token a sequence.

    Padding tokens come back zero and write nothing. The pages are updated in place where they are donated.

    Args:
      qkv: of each key/value head its queries, the key and the value.
      angles: to rotate queries and keys by; None: they are rotated.
    """
    tokens, kv_heads, lines, head_dim = qkv.shape
    if problem := decode_problem(head_dim, qkv.dtype, pages.dtype, lines - 2, pages.shape[1]):
        raise UserError(f"attention backend cuda {problem}; use attention backend xla")
    outs = []
    for first in range(0, tokens, _MOST_TOKENS):
        here = slice(first, first + _MOST_TOKENS)
        turned = None if angles is None else angles[here]
        out, pages = _attend(qkv[here], turned, pages, batch.positions[here], batch.rows[here], batch.page_table)
        outs.append(out)
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs), pages


def _attend(qkv, angles, pages, positions, rows, table):
    tokens, kv_heads, lines, head_dim = qkv.shape
    out, _, *written = kernels.call(
        "ernie_decode_attention",
        [
            jax.ShapeDtypeStruct((tokens, kv_heads, lines - 2, head_dim), qkv.dtype),
            partial_results(lines - 2),
            *described(pages),
        ],
        qkv,
        jnp.zeros((0, 2, head_dim // 2)) if angles is None else rotation(angles),
        positions,
        rows,
        table,
        *arrays(pages),
        aliases={5 + i: 2 + i for i in range(len(arrays(pages)))},
    )
    return out, rebuilt(pages, written)


def rotation(angles: jax.Array) -> jax.Array:
    """Return the cosines and sines [T, 2, H / 2] float32 that the kernel rotates by."""
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)


def partial_results(group: int) -> jax.ShapeDtypeStruct:
    """Describe the room that the kernel needs for what blocks find, with `group` query heads a key/value head."""
    return jax.ShapeDtypeStruct((_BLOCKS, 2, group, _PITCH), jnp.float32)
