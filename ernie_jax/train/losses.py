"""What training minimises, and what balances the experts beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ernie_jax.ops import Quantized, einsum

IGNORED = -100  # target of a token that predicts nothing
_MOST_LOGITS = 1 << 27  # 512 MiB of float32, and as much for what pulls on them


def token_losses(
    hidden: jax.Array,  # [T, D]
    weight: jax.Array | Quantized,  # [V, D]; a quantised one is int8 or fp8, and does not learn
    bias: jax.Array | None,  # [V]
    targets: jax.Array,  # [T] int32
    most_logits: int = _MOST_LOGITS,
) -> jax.Array:
    """Return -log softmax(weight hidden + bias)[target] in float32, [T]; zero where the target is IGNORED.

    Logits are float32 and there are never more than about `most_logits` of them: a chunk of tokens is done at a time,
    and done again for the gradient. The gradient of the weight is summed in float32 and rounded once; it is not
    computed where nobody asks for it, as of a frozen head.
    """
    return _chunk_losses(*_chunks(hidden, weight, targets, most_logits), weight, bias).reshape(-1)[: len(hidden)]


def summed_loss(
    hidden: jax.Array,
    weight: jax.Array | Quantized,
    bias: jax.Array | None,
    targets: jax.Array,
    most_logits: int = _MOST_LOGITS,
) -> jax.Array:
    """Return the sum of `token_losses`, of which the gradient is computed at once, from the same logits.

    All of a sum's gradient but a factor is known beforehand: that saves one of four products with the head.
    """
    return _chunk_sum(*_chunks(hidden, weight, targets, most_logits), weight, bias)


def _chunks(hidden, weight, targets, most_logits):
    """Cut into [n, rows, D] and [n, rows], the last chunk filled up."""
    tokens = len(hidden)
    chunks = -(-tokens * len(weight) // most_logits)
    rows = -(-tokens // chunks)
    chunks = -(-tokens // rows)
    more = chunks * rows - tokens
    hidden = jnp.pad(hidden, ((0, more), (0, 0))).reshape(chunks, rows, -1)
    return hidden, jnp.pad(targets, (0, more), constant_values=IGNORED).reshape(chunks, rows)


def _logits(rows, weight, bias):
    logits = einsum("td,vd->tv", rows, weight, jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def _losses(logits, target):
    """Return the losses of a chunk, and the logsumexp of its logits."""
    counted = target != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(counted, target, 0)[:, None], axis=1)[:, 0]
    total = jax.nn.logsumexp(logits, axis=1)
    return jnp.where(counted, total - chosen, 0), total


def _no_gradient(weight, learns_head):
    """Return where the head's gradient is summed in float32, of weight and bias; None if nobody asks for it."""
    return (jnp.zeros(weight.shape, jnp.float32), jnp.zeros(len(weight), jnp.float32)) if learns_head else None


def _pull(head, rows, target, logits, total, scale, weight):
    """Add the gradient of a chunk's losses times `scale` to the head's, and return it and that of the rows."""
    scale = jnp.where(target == IGNORED, 0, scale)[:, None]
    chosen = jnp.arange(len(weight)) == target[:, None]
    pull = (jnp.exp(logits - total[:, None]) - chosen) * scale  # of the logits
    narrow = pull.astype(rows.dtype)
    if head is not None:
        head = head[0] + einsum("tv,td->vd", narrow, rows, jnp.float32), head[1] + pull.sum(0)
    if isinstance(weight, Quantized):  # its scales lie along what is contracted here
        narrow, weight = (pull * weight.scales).astype(rows.dtype), weight.values.astype(rows.dtype)
    return head, einsum("tv,vd->td", narrow, weight)


def _rounded(head, weight, bias):
    if head is None:
        return None, None
    return head[0].astype(weight.dtype), None if bias is None else head[1].astype(bias.dtype)


def _given(hidden, targets, weight, bias):
    """Return the values of what a rule with symbolic zeros is given, and whether the head is differentiated."""
    learns_head = any(given.perturbed for given in jax.tree.leaves((weight, bias)))
    return jax.tree.map(lambda given: given.value, (hidden, targets, weight, bias)), learns_head


@jax.custom_vjp
def _chunk_losses(hidden, targets, weight, bias):  # [n, rows, D], [n, rows], [V, D], [V] or None -> [n, rows]
    return _chunk_losses_and_totals(hidden, targets, weight, bias)[0]


def _chunk_losses_and_totals(hidden, targets, weight, bias):
    return jax.lax.map(lambda chunk: _losses(_logits(chunk[0], weight, bias), chunk[1]), (hidden, targets))


def _chunk_losses_forward(*given):
    values, learns_head = _given(*given)
    losses, totals = _chunk_losses_and_totals(*values)
    return losses, (values, totals, () if learns_head else None)


def _chunk_losses_backward(residuals, gradient):
    (hidden, targets, weight, bias), totals, learns_head = residuals

    def one(head, chunk):
        rows, target, total, scale = chunk
        return _pull(head, rows, target, _logits(rows, weight, bias), total, scale, weight)

    head = _no_gradient(weight, learns_head is not None)
    head, of_hidden = jax.lax.scan(one, head, (hidden, targets, totals, gradient))
    return of_hidden, None, *_rounded(head, weight, bias)


_chunk_losses.defvjp(_chunk_losses_forward, _chunk_losses_backward, symbolic_zeros=True)


@jax.custom_vjp
def _chunk_sum(hidden, targets, weight, bias):
    return jnp.sum(_chunk_losses_and_totals(hidden, targets, weight, bias)[0])


def _chunk_sum_forward(*given):
    (hidden, targets, weight, bias), learns_head = _given(*given)

    def one(carry, chunk):
        loss, head = carry
        rows, target = chunk
        logits = _logits(rows, weight, bias)
        losses, total = _losses(logits, target)
        head, of_rows = _pull(head, rows, target, logits, total, 1.0, weight)
        return (loss + jnp.sum(losses), head), of_rows

    start = jnp.float32(0), _no_gradient(weight, learns_head)
    (loss, head), of_hidden = jax.lax.scan(one, start, (hidden, targets))
    return loss, (of_hidden, *_rounded(head, weight, bias))


def _chunk_sum_backward(gradients, scale):
    of_hidden, *of_head = (None if x is None else (scale * x).astype(x.dtype) for x in gradients)
    return of_hidden, None, *of_head


_chunk_sum.defvjp(_chunk_sum_forward, _chunk_sum_backward, symbolic_zeros=True)


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
