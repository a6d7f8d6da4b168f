"""Schedules, and which parameters are pulled and how much."""

import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.train import Recipe
from ernie_jax.train.optimizer import make_optimizer, make_schedule

BASE = {"model": "m", "data": "d", "sources": {"a": 1}, "output": "o", "batch_size": 1, "sequence_length": 8}


def recipe(**fields) -> Recipe:
    return Recipe(
        **BASE | {"steps": 100, "learning_rate": 1.0, "final_learning_rate": 0.1, "warmup_steps": 10} | fields
    )


@pytest.mark.parametrize(
    ("decay", "left"),
    [("half_life", lambda p: (0.05**p - 0.05) / 0.95), ("1-sqrt", lambda p: 1 - p**0.5)],
)
def test_warmup_stable_decay(decay, left):
    schedule = make_schedule(recipe(schedule="wsd", decay=decay, decay_steps=20))
    rates = [float(schedule(step)) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(10) / 10, atol=1e-7)
    assert set(rates[10:81]) == {1.0}
    np.testing.assert_allclose(rates[80:], [left(p) * 0.9 + 0.1 for p in np.arange(21) / 20], atol=1e-6)


def test_decay_takes_a_tenth_of_the_steps_unless_told():
    rates = [float(make_schedule(recipe(schedule="wsd", warmup_steps=0))(step)) for step in (0, 90, 91, 100)]
    assert rates[0] == rates[1] == 1.0 > rates[2]
    assert rates[3] == pytest.approx(0.1)


def test_cosine():
    schedule = make_schedule(recipe())
    np.testing.assert_allclose([schedule(5), schedule(10), schedule(55), schedule(100)], [0.5, 1, 0.55, 0.1], atol=1e-6)


def test_the_norm_is_clipped_matrices_decay_and_some_rates_differ():
    """The first step of AdamW is sign(gradient), whatever the gradient's size, but for its epsilon."""
    values = {name: jnp.ones(3) for name in ("a.weight", "b.norm.weight", "c.bias", "d.lora_b")}
    gradients = {name: jnp.array([30.0, -30.0, 0.0]) for name in values}
    one = recipe(warmup_steps=0, weight_decay=0.5, adam_epsilon=1.0, gradient_clip=2.0)
    optimizer = make_optimizer(one, make_schedule(one), {"d.lora_b": 4.0})
    updates, _ = optimizer.update(gradients, optimizer.init(values), values)
    clipped = 2 / np.sqrt(8)
    step = np.array([1, -1, 0]) * clipped / (clipped + 1)
    np.testing.assert_allclose(updates["a.weight"], -(step + 0.5), rtol=1e-5)
    for name in ("b.norm.weight", "c.bias"):
        np.testing.assert_allclose(updates[name], -step, rtol=1e-5)
    np.testing.assert_allclose(updates["d.lora_b"], -4 * (step + 0.5), rtol=1e-5)
