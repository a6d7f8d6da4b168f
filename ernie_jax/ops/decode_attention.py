"""The "cuda" backend's decode step: our own GPU kernel, which reads the cache once and at full width."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax import kernels
from ernie_jax.errors import UserError

MOST_TOKENS = 2048  # of a step, as in kernels/attention.cu
_BLOCKS = 512  # with a partial result each
_PITCH = 132  # floats of one: its dims, maximum and sum, and two to keep it aligned


def decode_problem(head_dim: int, dtype: jnp.dtype, group: int = 1, page_size: int = 16) -> str | None:
    """Say what the kernel does not take, if anything."""
    if head_dim != 128:
        return f"takes heads of 128, not of {head_dim}"
    if dtype != jnp.bfloat16:
        return f"takes bfloat16 pages, not {jnp.dtype(dtype).name}"
    if group > 16:
        return f"takes up to 16 query heads a key/value head, not {group}"
    if page_size % 16:
        return f"takes pages of a multiple of 16 tokens, not of {page_size}"
    return None


def decode_attention(q, k, v, pages, batch) -> tuple[jax.Array, jax.Array]:
    """Do what `paged_attention` does for a step of at most one token a sequence and MOST_TOKENS in all.

    Padding tokens come back zero and write nothing. The pages are updated in place where they are donated.
    """
    if problem := decode_problem(q.shape[-1], pages.dtype, q.shape[2], pages.shape[1]):
        raise UserError(f"attention backend cuda {problem}; use attention backend xla")
    out, pages, _ = kernels.call(
        "ernie_decode_attention",
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
            partial_results(q.shape[2]),
        ],
        q,
        k.astype(pages.dtype),
        v.astype(pages.dtype),
        pages,
        batch.positions,
        batch.rows,
        batch.page_table,
        aliases={3: 1},
    )
    return out, pages


def partial_results(group: int) -> jax.ShapeDtypeStruct:
    """Describe the room that the kernel needs for what blocks find, with `group` query heads a key/value head."""
    return jax.ShapeDtypeStruct((_BLOCKS, 2, group, _PITCH), jnp.float32)
