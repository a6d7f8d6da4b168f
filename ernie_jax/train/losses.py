"""What training minimises, and what balances the experts beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

IGNORED = -100  # target of a token that predicts nothing


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum -log softmax(logits)[target] in float32 over all tokens whose target is not IGNORED.

    Args:
      logits: [..., V].
      targets: [...] int32.

    Returns:
      The sum, float32, and how many tokens it is over.
    """
    logits = logits.astype(jnp.float32)
    counted = targets != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(losses, where=counted), jnp.sum(counted)


def expert_usage(experts: jax.Array, count: int, real: jax.Array) -> jax.Array:
    """Count how many choices of real tokens fell on each of `count` experts.

    Args:
      experts: [T, k] int32.
      real: [T] bool, false for padding.

    Returns:
      [E] int32.
    """
    chosen = (experts[..., None] == jnp.arange(count)) & real[:, None, None]
    return jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)


def balanced_bias(bias: jax.Array, usage: jax.Array, rate: float) -> jax.Array:
    """Move a router's correction bias [E] by `rate`: up for experts used less than the mean, down for the others.

    This balances without an auxiliary loss; the bias takes no gradient. Source: MoECorrectionBiasAdjustCallback in
    PaddleFormers' trainer_callback.py.
    """
    usage = usage.astype(jnp.float32)
    return bias + rate * jnp.sign(usage.mean() - usage)
