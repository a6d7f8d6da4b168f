"""Steps compiled ahead of time, for devices that need not be here: no weights, only shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.config import ModelConfig
from ernie_jax.engine.batching import StepShape
from ernie_jax.engine.cache import PAGE_SIZE, abstract_pages
from ernie_jax.engine.sampling import Features, SamplingParams, build_rows
from ernie_jax.engine.shapes import Shapes
from ernie_jax.engine.step import DeviceStep
from ernie_jax.kernels import compiling_for
from ernie_jax.model import abstract_model
from ernie_jax.ops import default_attention_backend, step_needs
from ernie_jax.sharding import Layout


def decode_shape(
    config: ModelConfig,
    layout: Layout,
    batch: int,
    context: int,
    page_size: int = PAGE_SIZE,
    dtype: jnp.dtype = jnp.bfloat16,
    kv_dtype: jnp.dtype | None = None,
) -> StepShape:
    """Return the step in which `batch` sequences of up to `context` tokens get one token each."""
    shapes = _shapes(config, layout, batch, batch, page_size, dtype, kv_dtype)
    return shapes.choose(_even(batch, layout), [[]] * layout.groups, context)


def prefill_shape(
    config: ModelConfig,
    layout: Layout,
    chunk: int,
    context: int,
    page_size: int = PAGE_SIZE,
    dtype: jnp.dtype = jnp.bfloat16,
    kv_dtype: jnp.dtype | None = None,
) -> StepShape:
    """Return the step that takes `chunk` tokens of one prompt, the last of `context` tokens.

    One data group has them all: the others wait, which is what a single long prompt costs.
    """
    chunks = [[chunk], *[[]] * (layout.groups - 1)]
    return _shapes(config, layout, 1, chunk, page_size, dtype, kv_dtype).choose([0] * layout.groups, chunks, context)


def mixed_shape(
    config: ModelConfig,
    layout: Layout,
    batch: int,
    chunk: int,
    context: int,
    page_size: int = PAGE_SIZE,
    dtype: jnp.dtype = jnp.bfloat16,
    kv_dtype: jnp.dtype | None = None,
) -> StepShape:
    """Return the step that takes `chunk` tokens of one prompt beside a token each of `batch` sequences."""
    chunks = [[chunk], *[[]] * (layout.groups - 1)]
    shapes = _shapes(config, layout, batch, chunk, page_size, dtype, kv_dtype)
    return shapes.choose(_even(batch, layout), chunks, context)


def lower_step(
    config: ModelConfig,
    layout: Layout,
    dtype: jnp.dtype,
    shape: StepShape,
    group_pages: int,
    page_size: int = PAGE_SIZE,
    kv_dtype: jnp.dtype | None = None,
    **backends: str | None,
) -> jax.stages.Lowered:
    """Lower the forward step of a model over a paged cache; `.compile()` what comes back.

    Args:
      layout: its mesh may be one of a compile-only topology.
      group_pages: cache pages of each data group, the scratch page included.
      kv_dtype: of the pages; default: `dtype`.
      **backends: expert_backend, attention_backend, exchange_backend; default: by the layout's platform.
    """
    step = DeviceStep(abstract_model(config, dtype, layout), layout, **backends, kv_dtype=kv_dtype)
    pages = abstract_pages(config, dtype if kv_dtype is None else kv_dtype, group_pages, page_size, layout)
    return step.lower(shape, pages, slots=shape.rows)


def lower_sample(config: ModelConfig, layout: Layout, dtype: jnp.dtype, rows: int) -> jax.stages.Lowered:
    """Lower the greedy sampler that follows a step of `rows` rows."""
    step = DeviceStep(abstract_model(config, dtype, layout), layout)
    logits = jax.ShapeDtypeStruct((rows, config.vocab_size), dtype, sharding=layout.sharding((None, "vocab")))
    greedy = [SamplingParams(temperature=0.0)] * rows
    nothing = [()] * rows
    state = build_rows(greedy, [0] * rows, nothing, nothing, features=Features(), vocab_size=config.vocab_size)

    def place(array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(array), array.dtype, sharding=layout.sharding())

    places = jax.tree.map(place, (state, np.zeros(rows, np.int32), np.zeros((2, rows), np.int32)))
    return step.lower_sample(logits, *places, features=Features(), valid_vocab=config.vocab_size)


def _shapes(config, layout, batch, chunk, page_size, dtype, kv_dtype) -> Shapes:
    """Return the shapes of the engine's steps with the attention backend that it chooses."""
    pages = -(-config.max_position_embeddings // page_size)
    kv_heads = config.num_key_value_heads // layout.size("kv_head")
    backend = default_attention_backend(layout.platform, config.head_dim, dtype, kv_heads, kv_dtype)
    with compiling_for(layout.capability):
        needs = step_needs(backend, page_size)
    return Shapes(layout.groups, batch, chunk, chunk, page_size, pages, **needs._asdict())


def _even(batch: int, layout: Layout) -> list[int]:
    return [-(-batch // layout.groups)] * layout.groups
