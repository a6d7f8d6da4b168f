"""Losses, bias update and the embedding's gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ernie_jax.ops import embed
from ernie_jax.train.losses import IGNORED, balanced_bias, expert_usage, routing_entropy, summed_loss, token_losses


def head_case(rng, dtype):
    """Hidden states, a head with a bias, targets of which some are ignored; and the losses in float64."""
    hidden = jnp.asarray(rng.normal(size=(17, 8)), dtype)
    weight = jnp.asarray(rng.normal(size=(101, 8)), dtype)
    bias = jnp.asarray(rng.normal(size=101), dtype)
    targets = rng.integers(0, 101, 17)
    targets[rng.random(17) < 0.3] = IGNORED
    logits = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64).T + np.asarray(bias, np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.maximum(targets, 0)[:, None], -1)[:, 0]
    return hidden, weight, bias, jnp.asarray(targets), np.where(targets == IGNORED, 0, losses)


@pytest.mark.parametrize("most_logits", [1 << 20, 505, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_token_losses_match_float64(dtype, most_logits, rng):
    *case, exact = head_case(rng, dtype)
    losses = token_losses(*case, most_logits)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("most_logits", [1 << 20, 505])
def test_gradients_of_token_losses_are_those_of_whole_logits(most_logits, rng):
    hidden, weight, bias, targets, _ = head_case(rng, jnp.float32)
    scale = jnp.asarray(rng.normal(size=17), jnp.float32)

    def plain(hidden, weight, bias):
        logits = hidden @ weight.T + bias
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], 1)[:, 0]
        return jnp.sum(jnp.where(targets == IGNORED, 0, scale * (jax.nn.logsumexp(logits, 1) - chosen)))

    expected = jax.grad(plain, (0, 1, 2))(hidden, weight, bias)
    found = jax.grad(lambda *a: jnp.sum(scale * token_losses(*a, targets, most_logits)), (0, 1, 2))(
        hidden, weight, bias
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert not np.asarray(found[0])[np.asarray(targets) == IGNORED].any()
    (alone,) = jax.grad(lambda h: jnp.sum(scale * token_losses(h, weight, None, targets, most_logits)), (0,))(hidden)
    assert alone.shape == hidden.shape


@pytest.mark.parametrize("most_logits", [1 << 20, 505])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_summed_loss_is_the_sum_with_its_gradient(dtype, most_logits, rng):
    *head, targets, exact = head_case(rng, dtype)
    found, gradients = jax.value_and_grad(lambda *a: 0.1 * summed_loss(*a, targets, most_logits), (0, 1, 2))(*head)
    np.testing.assert_allclose(found, 0.1 * exact.sum(), rtol=1e-5)
    np.testing.assert_allclose(summed_loss(*head, targets, most_logits), exact.sum(), rtol=1e-5)
    expected = jax.grad(lambda *a: 0.1 * jnp.sum(token_losses(*a, targets)), (0, 1, 2))(*head)
    for one, other in zip(gradients, expected, strict=True):
        assert one.dtype == dtype
        error = np.linalg.norm(np.asarray(one - other, np.float64)) / np.linalg.norm(np.asarray(other, np.float64))
        assert error < (1e-5 if dtype == jnp.float32 else 2**-7)


def test_summed_loss_multiplies_by_the_head_as_often_as_it_must(rng):
    hidden, weight, _, targets, _ = head_case(rng, jnp.float32)

    def products(function, *arguments):
        return str(jax.make_jaxpr(jax.grad(function, tuple(range(len(arguments)))))(*arguments)).count("dot_general")

    assert products(lambda h, w: summed_loss(h, w, None, targets), hidden, weight) == 3
    assert products(lambda h: summed_loss(h, weight, None, targets), hidden) == 2  # a frozen head
    assert products(lambda h, w: token_losses(h, w, None, targets).sum(), hidden, weight) == 4


def test_summed_loss_of_eight_devices_tokens(rng):
    hidden, weight, bias, targets, _ = head_case(rng, jnp.float32)
    hidden, targets = hidden[:16], targets[:16]
    mesh = jax.sharding.Mesh(jax.devices()[:8], "data")

    def of_each(*head):
        return summed_loss(*head, 101)[None]

    def of_all(hidden, weight, bias):
        specs = P("data"), P(), P(), P("data")
        parts = jax.shard_map(of_each, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
        return parts(hidden, weight, bias, targets).sum() / 7

    found = jax.jit(jax.value_and_grad(of_all, (0, 1, 2)))(hidden, weight, bias)
    alone = jax.value_and_grad(lambda *head: summed_loss(*head, targets) / 7, (0, 1, 2))(hidden, weight, bias)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [lambda *a: token_losses(*a).sum(), summed_loss])
def test_logits_are_never_held_whole(function):
    tokens, vocab, width, most = 512, 4096, 16, 1 << 14
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, width), (vocab, width)))
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def loss(hidden, weight, targets):
        return function(hidden, weight, None, targets, most)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes, targets).compile()
    weights = 3 * 4 * vocab * width  # gradient, its sum, and a copy
    assert compiled.memory_analysis().temp_size_in_bytes < weights + 6 * 4 * most < 4 * tokens * vocab / 4


def test_bias_moves_towards_equal_use(rng):
    experts = rng.integers(0, 8, (50, 2)) // rng.integers(1, 4)
    real = rng.random(50) < 0.8
    usage = np.bincount(experts[real].reshape(-1), minlength=8)
    np.testing.assert_array_equal(expert_usage(jnp.asarray(experts), 8, jnp.asarray(real)), usage)
    bias = rng.normal(size=8).astype(np.float32)
    expected = bias + np.float32(1e-3) * np.sign(usage.mean() - usage).astype(np.float32)
    np.testing.assert_array_equal(balanced_bias(jnp.asarray(bias), jnp.asarray(usage), 1e-3), expected)


def test_routing_entropy(rng):
    probabilities = rng.dirichlet(np.ones(5), 7)
    real = rng.random(7) < 0.6
    expected = -(probabilities * np.log(probabilities)).sum(1)[real].sum()
    np.testing.assert_allclose(routing_entropy(jnp.asarray(probabilities), jnp.asarray(real)), expected, rtol=1e-5)


def test_embedding_gradient_is_summed_in_float32(rng):
    tokens = rng.choice(4, p=[0.9, 0.06, 0.04, 0], size=5000)
    outer = jnp.asarray(rng.uniform(0.5, 1, (5000, 3)), jnp.bfloat16)
    expected = np.zeros((4, 3))
    np.add.at(expected, tokens, np.asarray(outer, np.float64))
    _, pull = jax.vjp(lambda table: embed(table, jnp.asarray(tokens)), jnp.zeros((4, 3), jnp.bfloat16))
    np.testing.assert_allclose(np.asarray(pull(outer)[0], np.float64), expected, rtol=2**-8)
