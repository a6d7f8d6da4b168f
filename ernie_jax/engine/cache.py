"""The paged KV cache: arrays on the devices, page bookkeeping on the host."""

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


class PagePools:
    """Hand out the pages of each data group, numbered 0..P-1 in it, and place new sequences in groups."""

    def __init__(self, groups: int, group_pages: int):
        self._free = [list(range(group_pages - 1, -1, -1)) for _ in range(groups)]
        self._sequences = [0] * groups

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free))

    def allocate(self, count: int) -> tuple[int, list[int]] | None:
        """Choose the group with fewest sequences that has `count` free pages and take them; None if there is none."""
        groups = [group for group, free in enumerate(self._free) if len(free) >= count]
        if not groups:
            return None
        group = min(groups, key=lambda group: (self._sequences[group], -len(self._free[group])))
        self._sequences[group] += 1
        return group, [self._free[group].pop() for _ in range(count)]

    def release(self, group: int, pages: list[int]) -> None:
        """Take back the pages of a sequence."""
        self._sequences[group] -= 1
        self._free[group].extend(pages)
