"""How many experts a layer's step reaches: the floors assume even routing, and random weights should give it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax.config import ModelConfig
from ernie_jax.model import Ernie
from ernie_jax.model.layers import ALL_ROWS, DEFAULT_BACKENDS, DecoderLayer, rotary_angles
from ernie_jax.model.transformer import Embedding
from ernie_jax.ops import packed_attention
from ernie_jax.sharding import WHOLE, Layout

_WINDOW = 32  # tokens of a sequence that are computed again
_COUNTED = 16  # of those, the last, whose choices are counted
_ROWS = 8  # sequences at once: few temporaries beside a full cache
_BACKENDS = DEFAULT_BACKENDS._replace(experts="dense")


def even_experts(config: ModelConfig, batch: int) -> float:
    """Return how many distinct experts `batch` tokens reach in a layer, expected under even routing."""
    return config.moe_num_experts * (1 - (1 - config.moe_k / config.moe_num_experts) ** batch)


def distinct_experts(model: Ernie, layout: Layout, sequences: Sequence[Sequence[int]]) -> float:
    """Return how many distinct experts the sequences' last tokens reach in a layer, mean over layers and positions.

    The tokens of one position count as a decode step. Only the last 32 are computed, as if nothing came before.
    """
    width = min(_WINDOW, *map(len, sequences))
    windows = np.array([sequence[-width:] for sequence in sequences], np.int32)
    padded = np.resize(windows, (-(-len(windows) // _ROWS) * _ROWS, width))
    parts = [_choices(model, layout, rows) for rows in np.split(padded, len(padded) // _ROWS)]
    choices = np.concatenate(parts, axis=1)[:, : len(windows), -_COUNTED:]  # [layers, B, positions, k]
    steps = np.moveaxis(choices, 2, 1).reshape(-1, len(windows) * choices.shape[-1])
    return statistics.fmean(len(set(step)) for step in steps.tolist())


def _choices(model: Ernie, layout: Layout, tokens: np.ndarray) -> np.ndarray:
    """Return the experts [layers, B, T, k] that tokens [B, T] choose, a layer at a time: two small programs."""
    here = layout.sharding()
    x = jax.jit(_embed, out_shardings=here)(model.embed, layout.put(tokens))
    angles = layout.put(np.asarray(rotary_angles(jnp.arange(tokens.shape[1]), model.config)))
    step = jax.jit(_layer, out_shardings=here)
    chosen = []
    for layer in model.layers:
        x, experts = step(layer, x, angles)
        if experts is not None:
            chosen.append(np.asarray(experts).reshape(*tokens.shape, -1))
    return np.stack(chosen)


def _embed(embed: Embedding, tokens: jax.Array) -> jax.Array:
    return embed(tokens)


def _layer(layer: DecoderLayer, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    segments = jnp.zeros(x.shape[:2], jnp.int32)

    def attend(q, k, v, cache):
        return packed_attention(q, k, v, segments), cache

    x, _, routing = layer(x, angles, attend, None, WHOLE, ALL_ROWS, _BACKENDS)
    return x, None if routing is None else routing.experts
