"""What training minimises, and what balances the experts beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.ops import einsum

IGNORED = -100  # target of a token that predicts nothing
_MOST_LOGITS = 1 << 27  # 512 MiB of float32, and as much for what pulls on them


def token_losses(
    hidden: jax.Array,  # [T, D]
    weight: jax.Array,  # [V, D]
    bias: jax.Array | None,  # [V]
    targets: jax.Array,  # [T] int32
    most_logits: int = _MOST_LOGITS,
) -> jax.Array:
    """Return -log softmax(weight hidden + bias)[target] in float32, [T]; zero where the target is IGNORED.

    Logits are float32 and there are never more than about `most_logits` of them: a chunk of tokens is done at a time,
    and done again for the gradient. The gradient of the weight is summed in float32 and rounded once; it is not
    computed where nobody asks for it, as of a frozen head.
    """
    tokens = len(hidden)
    chunks = -(-tokens * len(weight) // most_logits)
    rows = -(-tokens // chunks)
    chunks = -(-tokens // rows)
    more = chunks * rows - tokens
    hidden = jnp.pad(hidden, ((0, more), (0, 0))).reshape(chunks, rows, -1)
    targets = jnp.pad(targets, (0, more), constant_values=IGNORED).reshape(chunks, rows)
    return _chunk_losses(hidden, weight, bias, targets).reshape(-1)[:tokens]


@jax.custom_vjp
def _chunk_losses(hidden, weight, bias, targets):  # [n, rows, D], [V, D], [V] or None, [n, rows] -> [n, rows]
    return _forward(hidden, weight, bias, targets)[0]


def _logits(hidden, weight, bias):
    logits = einsum("td,vd->tv", hidden, weight, jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def _forward(hidden, weight, bias, targets):
    def one(chunk):
        rows, target = chunk
        logits, counted = _logits(rows, weight, bias), target != IGNORED
        chosen = jnp.take_along_axis(logits, jnp.where(counted, target, 0)[:, None], axis=1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=1)
        return jnp.where(counted, total - chosen, 0), total

    return jax.lax.map(one, (hidden, targets))


def _forward_remembering(hidden, weight, bias, targets):
    losses, totals = _forward(*(x and x.value for x in (hidden, weight, bias)), targets.value)
    learns_head = () if weight.perturbed or bias is not None and bias.perturbed else None
    return losses, (hidden.value, weight.value, bias and bias.value, targets.value, totals, learns_head)


def _backward(residuals, gradient):
    hidden, weight, bias, targets, totals, learns_head = residuals

    def one(sums, chunk):
        rows, target, total, scale = chunk
        scale = jnp.where(target == IGNORED, 0, scale)[:, None]
        chosen = jnp.arange(len(weight)) == target[:, None]
        pull = (jnp.exp(_logits(rows, weight, bias) - total[:, None]) - chosen) * scale  # of the logits
        narrow = pull.astype(rows.dtype)
        if sums is not None:
            sums = sums[0] + einsum("tv,td->vd", narrow, rows, jnp.float32), sums[1] + pull.sum(0)
        return sums, einsum("tv,vd->td", narrow, weight)

    sums = None
    if learns_head is not None:
        sums = jnp.zeros(weight.shape, jnp.float32), jnp.zeros(len(weight), jnp.float32)
    sums, of_hidden = jax.lax.scan(one, sums, (hidden, targets, totals, gradient))
    if sums is None:
        return of_hidden, None, None, None
    return of_hidden, sums[0].astype(weight.dtype), None if bias is None else sums[1].astype(bias.dtype), None


_chunk_losses.defvjp(_forward_remembering, _backward, symbolic_zeros=True)


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


def routing_entropy(probabilities: jax.Array, real: jax.Array) -> jax.Array:
    """Sum the entropy in nats of a router's probabilities [T, E] over real tokens [T]."""
    entropies = -jnp.sum(probabilities * jnp.log(jnp.maximum(probabilities, 1e-30)), axis=1)
    return jnp.sum(entropies, where=real)
