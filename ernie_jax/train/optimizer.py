"""AdamW and its schedules."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from ernie_jax.checkpoint import parse_dtype
from ernie_jax.train import moments
from ernie_jax.train.recipe import Recipe


def make_schedule(recipe: Recipe) -> optax.Schedule:
    """Return the learning rate of a step, counted from 0: a linear warm-up, then as the recipe's schedule says."""
    if recipe.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0, recipe.learning_rate, recipe.warmup_steps, recipe.steps, recipe.final_learning_rate
        )
    decay_steps = recipe.decay_steps or max(1, recipe.steps // 10)
    return _warmup_stable_decay(recipe, decay_steps)


def _warmup_stable_decay(recipe: Recipe, decay_steps: int) -> optax.Schedule:
    """Source: wsd_lr.py of PaddlePaddle/ERNIE, whose two decays these are."""
    peak, final = recipe.learning_rate, recipe.final_learning_rate

    def rate(step):
        part = jnp.clip((step - (recipe.steps - decay_steps)) / decay_steps, 0, 1)
        left = (0.05**part - 0.05) / 0.95 if recipe.decay == "half_life" else 1 - jnp.sqrt(part)
        warm = jnp.minimum(step / max(recipe.warmup_steps, 1), 1) if recipe.warmup_steps else 1.0
        return (left * (peak - final) + final) * warm

    return rate


def make_optimizer(
    recipe: Recipe, schedule: optax.Schedule, rates: Mapping[str, float]
) -> optax.GradientTransformation:
    """Return clipping by the norm of all gradients together, then AdamW, over a dict of parameters by dotted path.

    The norm is that of whole arrays, wherever their shards lie: each expert counts once.

    Args:
      rates: of some parameters, what their learning rate is multiplied by.
    """
    scale = optax.scale_by_learning_rate(schedule)
    if rates:
        scale = optax.chain(scale, _scaled(rates))
    adam = optax.scale_by_adam(recipe.adam_beta1, recipe.adam_beta2, recipe.adam_epsilon)
    packs = recipe.moment_dtype == "int8"
    return optax.chain(
        optax.clip_by_global_norm(recipe.gradient_clip),
        _packed(adam) if packs else _stored(adam, parse_dtype(recipe.moment_dtype)),
        optax.add_decayed_weights(recipe.weight_decay, lambda parameters: {name: _decays(name) for name in parameters}),
        scale,
    )


def _decays(name: str) -> bool:
    """Tell whether weight decay pulls a parameter: matrices yes, norms and biases no."""
    return not name.endswith("bias") and "norm" not in name


def _scaled(rates: Mapping[str, float]) -> optax.GradientTransformation:
    def scale(updates, parameters):
        return {name: update * rates.get(name, 1.0) for name, update in updates.items()}

    return optax.stateless(scale)


def _stored(adam: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Keep both moments in a dtype between steps; within one they are float32."""

    def cast(state: optax.ScaleByAdamState, dtype: jnp.dtype) -> optax.ScaleByAdamState:
        return state._replace(mu=optax.tree.cast(state.mu, dtype), nu=optax.tree.cast(state.nu, dtype))

    def init(parameters):
        zeros = optax.tree.zeros_like(parameters, dtype=dtype)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates, state, parameters=None):
        updates, state = adam.update(updates, cast(state, jnp.float32), parameters)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _packed(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep both moments in 8 bits between steps; within one they are float32."""

    def update(updates, state, parameters=None):
        mu, nu = ({name: moments.unpack(packed) for name, packed in part.items()} for part in (state.mu, state.nu))
        updates, found = adam.update(updates, optax.ScaleByAdamState(state.count, mu, nu), parameters)
        return updates, moments.pack(found.count, found.mu, found.nu)

    return optax.GradientTransformation(moments.zeros, update)
