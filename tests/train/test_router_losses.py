"""Router losses, against float64 and against what Baidu's own code computes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ernie_jax.model.layers import Router
from ernie_jax.ops import route
from ernie_jax.train.losses import balanced_bias, expert_usage
from ernie_jax.train.router_losses import load_balance_loss, orthogonality_loss, orthogonalized, z_loss

TOKENS, EXPERTS, K, WIDTH = 64, 8, 3, 16


@pytest.fixture(scope="module")
def published():
    with np.load(pathlib.Path(__file__).parent / "published" / "expected.npz") as file:
        return dict(file)


@pytest.fixture
def case(rng):
    """Logits, which tokens are no padding, and a router's weight."""
    real = rng.random(TOKENS) < 0.7
    return rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32), real, rng.normal(size=(EXPERTS, WIDTH))


def of_logits(logits, real, k=K):
    """Return the load-balance loss and the z-loss."""
    total = jax.nn.logsumexp(logits, axis=-1)
    return load_balance_loss(jax.nn.softmax(logits), k, real), z_loss(total, real)


def test_losses_match_float64(case):
    logits, real, weight = case
    exact = logits.astype(np.float64)
    probabilities = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    chosen = np.argsort(-exact[real], axis=-1)[:, :K]
    choices = np.bincount(chosen.ravel(), minlength=EXPERTS) / real.sum()
    balance, z = of_logits(logits, real)
    np.testing.assert_allclose(balance, EXPERTS * choices @ probabilities[real].mean(0), rtol=1e-5)
    np.testing.assert_allclose(z, (np.log(np.exp(exact[real]).sum(-1)) ** 2).mean(), rtol=1e-5)
    rows = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    overlap = rows @ rows.T - np.eye(EXPERTS)
    np.testing.assert_allclose(orthogonality_loss(jnp.asarray(weight, jnp.float32)), (overlap**2).mean(), rtol=1e-5)
    # d/dR mean(overlap^2) = 4 overlap R / E^2; of that, what is across the row, by the row's length
    pull = 4 * overlap @ rows / EXPERTS**2
    pull = (pull - (pull * rows).sum(1, keepdims=True) * rows) / np.linalg.norm(weight, axis=1, keepdims=True)
    step = np.asarray(orthogonalized(jnp.asarray(weight, jnp.float32), 10.0), np.float64) - weight
    np.testing.assert_allclose(step, -10 * pull, atol=1e-6)


def test_losses_match_the_published_code(published):
    logits, real, k = published["logits"], published["real"], int(published["k"])
    balance, pull = jax.value_and_grad(lambda x: of_logits(x, jnp.ones(len(x), bool), k)[0])(logits)
    np.testing.assert_allclose(balance, published["balance"], rtol=1e-6)
    np.testing.assert_allclose(pull, published["balance_gradient"], atol=1e-6)
    z, pull = jax.value_and_grad(lambda x: of_logits(x, real, k)[1])(logits)
    np.testing.assert_allclose(z, published["z"], rtol=1e-6)
    np.testing.assert_allclose(pull, published["z_gradient"], atol=1e-6)
    weight = published["weight"]
    np.testing.assert_allclose(orthogonality_loss(weight), published["orthogonality"][0], rtol=1e-5)
    expected = weight - np.float32(1e-3) * published["orthogonality_gradient"]
    np.testing.assert_allclose(orthogonalized(weight, 1e-3), expected, rtol=0, atol=2e-7)


def test_losses_at_their_ends():
    even = jnp.tile(jnp.eye(EXPERTS), (4, 1)) * 20  # each expert is first for as many tokens
    np.testing.assert_allclose(load_balance_loss(jax.nn.softmax(even), 1, jnp.ones(len(even), bool)), 1, rtol=1e-6)
    for loss in of_logits(even, jnp.zeros(len(even), bool)):
        assert loss == 0
    assert orthogonality_loss(jnp.eye(EXPERTS, WIDTH) * 3) < 1e-12
    dead = jnp.zeros((EXPERTS, WIDTH)).at[1:].set(jnp.eye(EXPERTS, WIDTH)[1:])
    assert np.isfinite(orthogonalized(dead, 1e-3)).all()


def test_router_gives_what_the_z_loss_takes(case, tiny_config, rng):
    _, real, _ = case
    router = Router(tiny_config)
    for parameter in (router.weight, router.correction_bias):
        parameter.set_value(jnp.asarray(rng.normal(size=parameter.shape), jnp.float32))
    x = jnp.asarray(rng.normal(size=(TOKENS, tiny_config.hidden_size)), jnp.float32)
    logits = np.asarray(x, np.float64) @ np.asarray(router.weight[...], np.float64).T
    np.testing.assert_allclose(router(x).log_total, np.log(np.exp(logits).sum(-1)), atol=1e-5)

    def run(router, x):
        found = router(x)
        return found.experts, z_loss(found.log_total, real)

    compiled = jax.jit(run).lower(router, x).compile().as_text()
    assert compiled.count(" dot(") == 1  # of two products that are alike, one is left


def balance(logits, real, weight, bias):
    """Return all that a step does to a router of some tokens' logits, which are their hidden states here."""
    experts, _, probabilities = route(logits, weight, bias, K, 1e-12)
    losses = [*of_logits(logits @ weight.T, real), orthogonality_loss(weight)]
    usage = expert_usage(experts, EXPERTS, real)
    return sum(losses), (losses, usage, balanced_bias(bias, usage, 1e-3), probabilities)


def test_eight_devices_equal_one(case, rng):
    logits, real, _ = case
    weight, bias = rng.normal(size=(EXPERTS, EXPERTS)).astype(np.float32), 40 + np.zeros(EXPERTS, np.float32)
    step = jax.jit(jax.value_and_grad(balance, (0, 2), has_aux=True))
    alone = step(logits, real, weight, bias)
    rows, whole = (NamedSharding(Mesh(jax.devices()[:8], "data"), spec) for spec in (P("data"), P()))
    sharded = step(*jax.device_put((logits, real, weight, bias), (rows, rows, whole, whole)))
    for one, eight in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6)
    (_, (_, usage, moved, _)), _ = sharded
    assert usage.sum() == K * real.sum()
    expected = bias + np.float32(1e-3) * np.sign(usage.mean() - usage).astype(np.float32)
    np.testing.assert_array_equal(moved, expected)
