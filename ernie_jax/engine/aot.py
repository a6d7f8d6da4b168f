"""Steps compiled ahead of time, for devices that need not be here: no weights, only shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.config import ModelConfig
from ernie_jax.engine.batching import StepShape, table_width
from ernie_jax.engine.cache import PAGE_SIZE, abstract_pages
from ernie_jax.engine.sampling import Features, SamplingParams, build_rows
from ernie_jax.engine.shapes import Shapes
from ernie_jax.engine.step import DeviceStep
from ernie_jax.model import abstract_model
from ernie_jax.sharding import Layout


def decode_shape(
    config: ModelConfig, layout: Layout, batch: int, context: int, page_size: int = PAGE_SIZE
) -> StepShape:
    """Return the step in which `batch` sequences of up to `context` tokens get one token each."""
    rows = -(-batch // layout.groups)
    pages = _pages(config, context, page_size)
    return StepShape(batch, batch, rows, rows, pages, query=1)


def prefill_shape(
    config: ModelConfig, layout: Layout, chunk: int, context: int, page_size: int = PAGE_SIZE
) -> StepShape:
    """Return the step that takes `chunk` tokens of one prompt, the last of `context` tokens.

    One data group has them all: the others wait, which is what a single long prompt costs.
    """
    return StepShape(chunk, 1, chunk, 1, _pages(config, context, page_size), query=chunk)


def mixed_shape(
    config: ModelConfig, layout: Layout, batch: int, chunk: int, context: int, page_size: int = PAGE_SIZE
) -> StepShape:
    """Return the step that takes `chunk` tokens of one prompt beside a token each of `batch` sequences."""
    pages = -(-config.max_position_embeddings // page_size)
    splits = layout.platform != "tpu"
    shapes = Shapes(layout.groups, batch, chunk, chunk, page_size, pages, pads=layout.platform == "cpu", splits=splits)
    chunks = [[chunk], *[[]] * (layout.groups - 1)]
    return shapes.choose([-(-batch // layout.groups)] * layout.groups, chunks, context)


def lower_step(
    config: ModelConfig,
    layout: Layout,
    dtype: jnp.dtype,
    shape: StepShape,
    group_pages: int,
    page_size: int = PAGE_SIZE,
    **backends: str | None,
) -> jax.stages.Lowered:
    """Lower the forward step of a model over a paged cache; `.compile()` what comes back.

    Args:
      layout: its mesh may be one of a compile-only topology.
      group_pages: cache pages of each data group, the scratch page included.
      **backends: expert_backend, attention_backend, exchange_backend; default: by the layout's platform.
    """
    step = DeviceStep(abstract_model(config, dtype, layout), layout, **backends)
    return step.lower(shape, abstract_pages(config, dtype, group_pages, page_size, layout), slots=shape.rows)


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


def _pages(config: ModelConfig, context: int, page_size: int) -> int:
    most = -(-config.max_position_embeddings // page_size)
    return table_width(-(-context // page_size), most, page_size)
