"""The paged KV cache on the devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.config import ModelConfig
from ernie_jax.errors import UserError
from ernie_jax.ops.pages import Pages, ScaledPages, is_scaled
from ernie_jax.sharding import Layout

# The TPU kernels' page; 128 tokens of the 21B model are 256 KiB a layer.
PAGE_SIZE = 128
# Bytes, from the least that is allocated to more than a step's counts of experts; and more gaps of each size than steps
# in flight hold arrays.
_GAPS, _GAPS_OF_A_SIZE = [256 << power for power in range(8)], 64
_SCALE = jnp.dtype(jnp.float32)
_PAGE_AXES = ("page", None, "kv_head", "head_dim")
_SCALE_AXES = ("page", "kv_head", None)
_DTYPES = {"bfloat16": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def parse_kv_dtype(name: str | None, dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of the cache's pages: by name, or of the model, `dtype`.

    Raises:
      UserError: if there is no such name.
    """
    if name not in (None, *_DTYPES):
        raise UserError(f"kv_dtype={name}: unknown; choose one of {', '.join(_DTYPES)}")
    return jnp.dtype(dtype if name is None else _DTYPES[name])


def kv_name(dtype: jnp.dtype) -> str:
    """Name the dtype of pages as `parse_kv_dtype` takes it."""
    return next((name for name, known in _DTYPES.items() if known == dtype), jnp.dtype(dtype).name)


def check_kv_dtype(config: ModelConfig, dtype: jnp.dtype, layout: Layout, platform: str) -> None:
    """Check that pages of a dtype are written in place where a layout puts them.

    Args:
      platform: of the devices, for which a plan's layout has stand-ins.

    Raises:
      UserError: if they are not.
    """
    # With fewer heads a TPU's XLA lays pages out by head, and turns the whole cache over for a write or a read.
    least = {"int8": 4, "fp8": 2}.get(kv_name(dtype), 1)
    heads = config.num_key_value_heads // layout.size("kv_head")
    if platform == "tpu" and heads < least:
        raise UserError(
            f"--kv_dtype={kv_name(dtype)} needs {least} or more key/value heads on each TPU device, and sharding "
            f"{layout.describe()} leaves {heads} of {config.num_key_value_heads}; use bfloat16 or another sharding"
        )


def bytes_per_token(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Return the cache bytes of one token over all layers, those of scales included."""
    head = config.head_dim * jnp.dtype(dtype).itemsize + (_SCALE.itemsize if is_scaled(dtype) else 0)
    return config.num_hidden_layers * 2 * config.num_key_value_heads * head


def page_specs(config: ModelConfig, dtype: jnp.dtype, layout: Layout) -> list:
    """Return the PartitionSpecs of `abstract_pages`."""
    values = layout.spec(_PAGE_AXES)
    pages = ScaledPages(values, layout.spec(_SCALE_AXES)) if is_scaled(dtype) else values
    return [pages] * config.num_hidden_layers


def abstract_pages(
    config: ModelConfig, dtype: jnp.dtype, group_pages: int, page_size: int, layout: Layout
) -> list[Pages]:
    """Describe the cache: pages [P, page_size, 2K, H] for each layer, k and v interleaved by head; of int8 with scales.

    Args:
      group_pages: pages of each data group; P is that times the number of groups.
    """
    count, heads = layout.groups * group_pages, 2 * config.num_key_value_heads
    shape = count, page_size, heads, config.head_dim
    pages = jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(_PAGE_AXES))
    if is_scaled(dtype):
        scales = jax.ShapeDtypeStruct((count, heads, page_size), _SCALE, sharding=layout.sharding(_SCALE_AXES))
        pages = ScaledPages(pages, scales)
    return [pages] * config.num_hidden_layers


def make_pages(config: ModelConfig, dtype: jnp.dtype, group_pages: int, page_size: int, layout: Layout) -> list[Pages]:
    """Allocate what `abstract_pages` describes."""
    abstract = abstract_pages(config, dtype, group_pages, page_size, layout)
    arrays, structure = jax.tree.flatten(abstract[0])
    shardings = [array.sharding for array in arrays]
    zeros = jax.jit(lambda: [jnp.zeros(array.shape, array.dtype) for array in arrays], out_shardings=shardings)
    return [structure.unflatten(zeros()) for _ in abstract]


def leave_gaps(layout: Layout) -> list[jax.Array]:
    """Leave gaps for small arrays in the memory of GPUs, between arrays that are returned and must live on.

    An array gets the smallest free piece that holds it. Without gaps the small ones that some steps in flight hold lie
    in front of a step's temporaries, another few after every step, so that these move; and when they move, the host
    writes anew each kernel of the step's CUDA graph. For a single sequence that takes half as long as the step.
    """
    if layout.platform != "gpu":
        return []
    kept = []
    for size in _GAPS:
        pieces = [layout.put(np.zeros(size, np.uint8)) for _ in range(2 * _GAPS_OF_A_SIZE)]
        jax.block_until_ready(pieces)
        kept += pieces[::2]
    return kept


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
                "weights; use a smaller dtype or kv_dtype, more devices or larger ones"
            )
        tokens = min(tokens, free // per_token)
    return tokens
