"""Multi-token prediction: learning to predict tokens beyond the next one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ernie_jax.model import Backends, Ernie
from ernie_jax.model.layers import DEFAULT_BACKENDS, Attend, rotary_angles
from ernie_jax.train.losses import IGNORED


def predictions(
    model: Ernie,
    hidden: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    backends: Backends = DEFAULT_BACKENDS,
    remember: Callable[[Callable], Callable] = lambda block: block,
) -> list[jax.Array]:
    """Return for each depth d, from 1 on, the hidden states [B, T, D] that predict token t + d + 1 by the model's head.

    At the end of a document, where there is no token t + d, they mean nothing, and no other position sees them.

    Args:
      hidden: [B, T, D], `ModelOutput.hidden` of the same tokens.
      tokens, positions: [B, T] int32.
      attend, remember: as for the model.
    """
    angles = rotary_angles(positions, model.config)

    def run(block, hidden, embedded):
        return block(hidden, embedded, angles, attend, backends=backends)[0]

    run, found = remember(run), []
    for depth, block in enumerate(model.mtp, start=1):
        with jax.named_scope(f"mtp_{depth}"):
            hidden = model.norm(run(block, hidden, model.embed(_ahead(tokens, depth, 0))))
        found.append(hidden)
    return found


def shifted_targets(targets: jax.Array, segments: jax.Array, depth: int) -> jax.Array:
    """Return the targets [B, T] of a depth: those `depth` tokens further on in the same document, else IGNORED."""
    same = _ahead(segments, depth, -1) == segments
    return jnp.where(same, _ahead(targets, depth, IGNORED), IGNORED)


def _ahead(x, steps, fill):
    return jnp.pad(x[:, steps:], ((0, 0), (0, min(steps, x.shape[1]))), constant_values=fill)
