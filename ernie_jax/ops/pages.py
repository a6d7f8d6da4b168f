"""Pages of the KV cache: what is stored of a key or value, and what is read of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_MOST = 127  # symmetric: -128 is not used
_LEAST = 1e-30  # of a head's largest number: below this all are 0, as a step may be no float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledPages:
    """Pages in int8: values [P, page_size, 2K, H] times scales [P, 2K, page_size] float32, one a token and head.

    A page's scales lie by head, so that those of a head's positions are neighbours, as the scores are that they scale.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def __len__(self) -> int:
        return len(self.values)


Pages = jax.Array | ScaledPages  # an array's dtype may be an 8-bit float


def arrays(pages: Pages) -> list[jax.Array]:
    """Return what the kernels take of pages: the numbers, and the scales if there are any."""
    return jax.tree.leaves(pages)


def described(pages: Pages) -> list[jax.ShapeDtypeStruct]:
    """Describe `arrays` as a result."""
    return [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays(pages)]


def rebuilt(pages: Pages, made: list[jax.Array]) -> Pages:
    """Return pages like others from new `arrays`."""
    return jax.tree.structure(pages).unflatten(made)


def is_scaled(dtype: jnp.dtype) -> bool:
    """Tell whether pages of a dtype have scales."""
    return jnp.dtype(dtype) == jnp.int8


def quantize_heads(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round keys or values [..., H] to int8; returns them and their scales [...] float32."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    steps = jnp.where(largest > _LEAST, _MOST / largest, 0)
    return jnp.round(x * steps[..., None]).astype(jnp.int8), largest * (1 / _MOST)


def round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast to what pages without scales hold; what an 8-bit float has no number for becomes its largest."""
    if jnp.dtype(dtype).itemsize == 1:
        most = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)


def as_cached(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return keys or values [..., H] as pages of a dtype give them back."""
    if is_scaled(dtype):
        values, scales = quantize_heads(x)
        return (values * scales[..., None]).astype(x.dtype)
    return round_to(x, dtype).astype(x.dtype)


def write(pages: Pages, page: jax.Array, slot: jax.Array, new: jax.Array) -> Pages:
    """Put new [T, 2K, H] at places [T], all different, of which those beyond the pages are dropped."""
    options = {"mode": "drop", "unique_indices": True}
    if not isinstance(pages, ScaledPages):
        return pages.at[page, slot].set(round_to(new, pages.dtype), **options)
    values, scales = quantize_heads(new)
    return ScaledPages(
        pages.values.at[page, slot].set(values, **options), pages.scales.at[page, :, slot].set(scales, **options)
    )


def take(pages: Pages, ids: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return keys and values [B, S, K, 2, H] of pages ids [B, n], and their scales [B, K, 2, S] if there are any."""
    _, page_size, heads, head_dim = pages.shape
    rows, count = ids.shape
    positions = count * page_size
    if not isinstance(pages, ScaledPages):
        return pages[ids].reshape(rows, positions, heads // 2, 2, head_dim), None
    scales = jnp.moveaxis(pages.scales[ids], 1, 2).reshape(rows, heads // 2, 2, positions)
    return pages.values[ids].reshape(rows, positions, heads // 2, 2, head_dim), scales
