"""Learning from pairs of answers: DPO and its variants, as PaddleFormers' dpo_loss.py computes them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ernie_jax.train.data import Batch
from ernie_jax.train.losses import IGNORED
from ernie_jax.train.preference_options import PreferenceOptions


class Answers(NamedTuple):
    """Answers by row and segment.

    Attributes:
      logprobs: [B, S] float32, summed over an answer's tokens.
      lengths: [B, S] int32, how many these are.
    """

    logprobs: jax.Array
    lengths: jax.Array


class PreferenceSums(NamedTuple):
    """What pairs add up to; all are sums over the real pairs, float32.

    Attributes:
      loss: the preference loss.
      chosen_loss, rejected_loss: cross-entropy of the answers' tokens.
      chosen_reward, rejected_reward: beta times the log-probability gained on the reference, lengths normalised.
      correct: how many chosen answers have the greater reward.
    """

    loss: jax.Array
    chosen_loss: jax.Array
    rejected_loss: jax.Array
    chosen_reward: jax.Array
    rejected_reward: jax.Array
    correct: jax.Array


def interleaved(chosen: Batch, rejected: Batch) -> Batch:
    """Put each row [B, T] beside its other, [2B, T], so that one run of the model does both; shards keep their rows."""
    return jax.tree.map(lambda *sides: jnp.stack(sides, axis=1).reshape(-1, *sides[0].shape[1:]), chosen, rejected)


def answers(logprobs: jax.Array, targets: jax.Array, segments: jax.Array, count: int) -> Answers:
    """Add up log-probabilities [B, T] of targets that are not IGNORED over each of a row's `count` segments."""
    mine = (segments[..., None] == jnp.arange(count)) & (targets != IGNORED)[..., None]
    return Answers(jnp.sum(logprobs[..., None], axis=1, where=mine), jnp.sum(mine, axis=1, dtype=jnp.int32))


def sides(both: Answers) -> tuple[Answers, Answers]:
    """Return the chosen and the rejected ones of `interleaved` rows."""
    return Answers(*(x[0::2] for x in both)), Answers(*(x[1::2] for x in both))


def preference_sums(
    options: PreferenceOptions,
    chosen: Answers,
    rejected: Answers,
    reference: tuple[jax.Array, jax.Array] | None,
    real: jax.Array,
) -> PreferenceSums:
    """Compare the answers of each pair [B, S].

    Args:
      reference: the sums of the chosen and of the rejected answers' log-probabilities by the reference model; None
        where the variant needs none.
      real: [B, S] bool, where there is a pair.
    """
    to_chosen, to_rejected = _scales(options, chosen.lengths, rejected.lengths)
    gained_chosen, gained_rejected = chosen.logprobs * to_chosen, rejected.logprobs * to_rejected
    if options.needs_reference:
        gained_chosen -= reference[0] * to_chosen
        gained_rejected -= reference[1] * to_rejected
    rewards = options.beta * gained_chosen, options.beta * gained_rejected
    values = (
        _losses(options, gained_chosen, gained_rejected),
        -chosen.logprobs,
        -rejected.logprobs,
        *rewards,
        (rewards[0] > rewards[1]).astype(jnp.float32),
    )
    return PreferenceSums(*(jnp.sum(value, where=real) for value in values))


def preference_objective(
    options: PreferenceOptions, sums: PreferenceSums, pairs: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Return what is minimised, of so many pairs with so many tokens in the chosen answers.

    Of parts of a step, whose objectives add up, both numbers are those of the whole step.
    """
    preference = sums.loss / jnp.maximum(pairs, 1)
    return options.preference_weight * preference + options.sft_weight * sums.chosen_loss / jnp.maximum(tokens, 1)


def _scales(options, chosen, rejected):
    """Return what the sums over so many tokens are multiplied by."""
    chosen, rejected = (jnp.maximum(length, 1).astype(jnp.float32) for length in (chosen, rejected))
    if options.variant in ("ipo", "simpo"):
        return 1 / chosen, 1 / rejected
    if options.normalize_lengths:
        mean = (chosen + rejected) / 2
        return mean / chosen, mean / rejected
    return jnp.ones_like(chosen), jnp.ones_like(rejected)


def _losses(options, chosen, rejected):
    """Return a loss for each pair, from the log-probabilities that its answers gained."""
    beta, lead = options.beta, chosen - rejected
    if options.variant == "hinge":
        return jax.nn.relu(1 - beta * lead)
    if options.variant == "ipo":
        return (lead - 1 / (2 * beta)) ** 2
    if options.variant == "dpop":
        return -jax.nn.log_sigmoid(beta * (lead - options.dpop_weight * jax.nn.relu(-chosen)))
    score = beta * lead - (options.simpo_margin if options.variant == "simpo" else 0)
    smoothing = options.label_smoothing
    return -(1 - smoothing) * jax.nn.log_sigmoid(score) - smoothing * jax.nn.log_sigmoid(-score)
