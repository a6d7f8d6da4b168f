"""What keeps the choices of a router spread and its scores moderate, beside the loss of the tokens.

Each is of one MoE layer and a scalar in float32; over rows that are sharded its sums are those of all shards. Sources:
topk_gate.py and ortho_loss_callback.py of PaddleFormers. `losses.balanced_bias` balances without any loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.ops import einsum
from ernie_jax.train.losses import expert_usage


def load_balance_loss(probabilities: jax.Array, k: int, real: jax.Array) -> jax.Array:
    """Return E times the sum over experts of mean probability x choices a token; k where all experts are used alike.

    The choices are those of the probabilities alone, whatever a correction bias makes of them, and have no gradient.

    Args:
      probabilities: [T, E] float32, before the bias.
      k: choices of a token.
      real: [T] bool, false for padding.
    """
    count = probabilities.shape[1]
    tokens = _tokens(real)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probabilities), k)
    choices = expert_usage(chosen, count, real) / tokens
    return count * jnp.sum(choices * jnp.sum(probabilities, axis=0, where=real[:, None]) / tokens)


def z_loss(log_total: jax.Array, real: jax.Array) -> jax.Array:
    """Return the mean square of log(sum(exp(logits))) [T] over the tokens that are `real`: it keeps logits small."""
    return jnp.sum(log_total**2, where=real) / _tokens(real)


def orthogonality_loss(weight: jax.Array) -> jax.Array:
    """Return the mean square of R R^T - I, where R are the rows of a router's weight [E, D], scaled to length 1."""
    weight = weight.astype(jnp.float32)
    squares = jnp.sum(weight * weight, axis=1, keepdims=True)
    rows = weight * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))  # a length of at least 1e-12
    overlap = einsum("ed,fd->ef", rows, rows) - jnp.eye(len(rows))
    return jnp.mean(overlap * overlap)


def orthogonalized(weight: jax.Array, rate: float) -> jax.Array:
    """Take a step of `rate` down the gradient of `orthogonality_loss`; after the optimiser's, like weight decay.

    ERNIE was pre-trained with a rate of 1e-3, whatever the learning rate.
    """
    return weight - rate * jax.grad(orthogonality_loss)(weight)


def _tokens(real):
    return jnp.maximum(jnp.sum(real), 1).astype(jnp.float32)
