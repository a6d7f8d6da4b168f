"""Losses, bias update and the embedding's gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.ops import embed
from ernie_jax.train.losses import IGNORED, balanced_bias, cross_entropy, expert_usage


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-6)])
def test_cross_entropy_matches_float64(dtype, bound, rng):
    logits = jnp.asarray(rng.normal(scale=5, size=(3, 17, 101)), dtype)
    targets = rng.integers(0, 101, (3, 17))
    targets[rng.random((3, 17)) < 0.3] = IGNORED
    exact = np.asarray(logits, np.float64)
    losses = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, np.maximum(targets, 0)[..., None], -1)[..., 0]
    loss, count = cross_entropy(logits, jnp.asarray(targets))
    assert count == (targets != IGNORED).sum()
    np.testing.assert_allclose(loss, losses[targets != IGNORED].sum(), rtol=bound)


def test_cross_entropy_has_no_gradient_where_ignored(rng):
    logits = jnp.asarray(rng.normal(size=(6, 11)), jnp.float32)
    targets = jnp.array([3, IGNORED, 0, IGNORED, 10, 5])
    gradient = np.asarray(jax.grad(lambda x: cross_entropy(x, targets)[0])(logits))
    assert (np.abs(gradient).sum(-1) > 0).tolist() == (np.asarray(targets) != IGNORED).tolist()


def test_bias_moves_towards_equal_use(rng):
    experts = rng.integers(0, 8, (50, 2)) // rng.integers(1, 4)
    real = rng.random(50) < 0.8
    usage = np.bincount(experts[real].reshape(-1), minlength=8)
    np.testing.assert_array_equal(expert_usage(jnp.asarray(experts), 8, jnp.asarray(real)), usage)
    bias = rng.normal(size=8).astype(np.float32)
    expected = bias + np.float32(1e-3) * np.sign(usage.mean() - usage).astype(np.float32)
    np.testing.assert_array_equal(balanced_bias(jnp.asarray(bias), jnp.asarray(usage), 1e-3), expected)


def test_embedding_gradient_is_summed_in_float32(rng):
    tokens = rng.choice(4, p=[0.9, 0.06, 0.04, 0], size=5000)
    outer = jnp.asarray(rng.uniform(0.5, 1, (5000, 3)), jnp.bfloat16)
    expected = np.zeros((4, 3))
    np.add.at(expected, tokens, np.asarray(outer, np.float64))
    _, pull = jax.vjp(lambda table: embed(table, jnp.asarray(tokens)), jnp.zeros((4, 3), jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(pull(outer)[0], np.float64), expected, rtol=2**-8)
