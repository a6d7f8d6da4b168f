"""The paged KV cache: arrays on the devices, page bookkeeping on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ernie_jax import sharding
from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError

# The TPU kernels' page; 128 tokens of the 21B model are 256 KiB a layer.
PAGE_SIZE = 128
PAGE_AXES = ("page", None, "kv_head", "head_dim")


def bytes_per_token(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Return the cache bytes of one token over all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * jnp.dtype(dtype).itemsize


def make_pages(config: ModelConfig, dtype: jnp.dtype, num_pages: int, page_size: int, mesh: Mesh) -> list[jax.Array]:
    """Allocate one array [P, page_size, 2K, H] a layer, k and v interleaved by head."""
    shape = (num_pages, page_size, 2 * config.num_key_value_heads, config.head_dim)
    where = NamedSharding(mesh, sharding.spec(PAGE_AXES))
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)
    return [zeros() for _ in range(config.num_hidden_layers)]


def default_cache_tokens(config: ModelConfig, dtype: jnp.dtype, device: jax.Device, most: int) -> int:
    """Choose how many tokens to cache: what fits in the device's free memory, at most `most`.

    A tenth of the device's memory stays free for temporaries. Where the device reports no memory (a CPU) the cache gets
    1 GiB.
    """
    stats = device.memory_stats() or {}
    free = 1 << 30
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] * 9 // 10 - stats["bytes_in_use"]
    tokens = min(free // bytes_per_token(config, dtype), most)
    if tokens < PAGE_SIZE:
        raise UserError(
            f"no room for a KV cache: {free / 1e9:.2f} GB of device memory are left beside the weights; "
            "use a smaller dtype or a larger device"
        )
    return tokens


class PageAllocator:
    """Hand out page numbers 0..P-1."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` pages, or none at all if fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: list[int]) -> None:
        self._free.extend(pages)
