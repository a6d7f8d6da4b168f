"""The paged KV cache on the devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.sharding import Layout

# The TPU kernels' page; 128 tokens of the 21B model are 256 KiB a layer.
PAGE_SIZE = 128
PAGE_AXES = ("page", None, "kv_head", "head_dim")


def bytes_per_token(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Return the cache bytes of one token over all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * jnp.dtype(dtype).itemsize


def abstract_pages(
    config: ModelConfig, dtype: jnp.dtype, group_pages: int, page_size: int, layout: Layout
) -> list[jax.ShapeDtypeStruct]:
    """Describe the cache: one array [P, page_size, 2K, H] a layer, k and v interleaved by head.

    Args:
      group_pages: pages of each data group; P is that times the number of groups.
    """
    shape = (layout.groups * group_pages, page_size, 2 * config.num_key_value_heads, config.head_dim)
    pages = jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(PAGE_AXES))
    return [pages] * config.num_hidden_layers


def make_pages(
    config: ModelConfig, dtype: jnp.dtype, group_pages: int, page_size: int, layout: Layout
) -> list[jax.Array]:
    """Allocate what `abstract_pages` describes."""
    abstract = abstract_pages(config, dtype, group_pages, page_size, layout)
    zeros = jax.jit(lambda: jnp.zeros(abstract[0].shape, dtype), out_shardings=abstract[0].sharding)
    return [zeros() for _ in abstract]


def default_group_tokens(config: ModelConfig, dtype: jnp.dtype, layout: Layout, most: int) -> int:
    """Choose how many tokens a data group caches: what fits in this process's devices' free memory, at most `most`.

    A tenth of a device's memory stays free for temporaries. Where devices report no memory (CPUs) the cache gets 1 GiB.
    """
    per_token = bytes_per_token(config, dtype) // layout.size("kv_head")
    tokens = most
    for device in layout.mesh.local_devices:
        stats = device.memory_stats() or {}
        free = (1 << 30) // layout.mesh.local_mesh.size
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] * 9 // 10 - stats["bytes_in_use"]
        if free < per_token * PAGE_SIZE:
            raise UserError(
                f"no room for a KV cache: {free / 1e9:.2f} GB of {device.device_kind} memory are left beside the "
                "weights; use a smaller dtype, more devices or larger ones"
            )
        tokens = min(tokens, free // per_token)
    return tokens
