"""Multi-token prediction, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ernie_jax.model import Ernie, initialize
from ernie_jax.ops import dequantize, packed_attention
from ernie_jax.sharding import single
from ernie_jax.train.losses import IGNORED, summed_loss
from ernie_jax.train.mtp import predictions, shifted_targets

DOCUMENTS = [[5, 4, 6], [9, 3]]  # lengths, of two rows; what is left of 16 is padding
ROWS, LENGTH, DEPTHS = 2, 16, 2


@pytest.fixture(scope="module")
def model(tiny_config):
    config = dataclasses.replace(tiny_config, num_hidden_layers=1, num_nextn_predict_layers=DEPTHS)
    model = Ernie(config, jnp.float32)
    initialize(model, single(), seed=5, scale=0.2)
    for index, block in enumerate((*model.mtp, model)):  # norms that are not one
        for norm in ("embed_norm", "hidden_norm", "norm"):
            if hasattr(block, norm):
                weight = getattr(block, norm).weight
                weight.set_value(1 + 0.3 * jax.random.normal(jax.random.key(index), weight.shape))
    return model


@pytest.fixture
def batch(rng):
    """Tokens, positions, segments and targets of packed documents, some not learnt."""
    tokens = rng.integers(0, 320, (ROWS, LENGTH)).astype(np.int32)
    positions, segments, targets = (np.full_like(tokens, fill) for fill in (0, -1, IGNORED))
    for row, lengths in enumerate(DOCUMENTS):
        place = 0
        for segment, length in enumerate(lengths):
            shown = slice(place, place + length)
            positions[row, shown], segments[row, shown] = np.arange(length), segment
            targets[row, shown][:-1] = tokens[row, shown][1:]
            place += length
    targets[rng.random(targets.shape) < 0.2] = IGNORED
    return tokens, positions, segments, targets


def numbers(parameter):
    return np.asarray(parameter[...], np.float64)


def norm(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * numbers(weight)


def silu(x):
    return x / (1 + np.exp(-x))


def exact_block(model, block, hidden, embedded):
    """Compute a block for one document [T, D] in float64."""
    config = model.config
    epsilon, layer = config.rms_norm_eps, block.layer
    pair = [norm(embedded, block.embed_norm.weight, epsilon), norm(hidden, block.hidden_norm.weight, epsilon)]
    x = np.concatenate(pair, axis=1) @ numbers(block.proj.weight).T
    h = norm(x, layer.input_norm.weight, epsilon)
    qkv = np.einsum("td,krhd->tkrh", h, numbers(layer.attention.qkv.weight))
    powers = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    turn = np.exp(1j * np.arange(len(x))[:, None] * powers)[:, None, None]
    turned = (qkv[..., 0::2] + 1j * qkv[..., 1::2]) * turn
    rotated = np.stack([turned.real, turned.imag], -1).reshape(qkv.shape)
    q, k, v = rotated[:, :, :-2], rotated[:, :, -2], qkv[:, :, -1]
    scores = np.einsum("qkrh,skh->krqs", q, k) / np.sqrt(config.head_dim)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum("krqs,skh,dkrh->qd", weights, v, numbers(layer.attention.out.weight))
    gate, up = np.einsum(
        "td,xfd->xtf", norm(x, layer.post_attention_norm.weight, epsilon), numbers(layer.mlp.gate_up.weight)
    )
    return x + (silu(gate) * up) @ numbers(layer.mlp.down.weight).T


def losses(model, hidden, batch):
    """Return the mean loss of each depth."""
    tokens, positions, segments, targets = batch

    def attend(q, k, v, cache):
        return packed_attention(q, k, v, segments), cache

    found = predictions(model, hidden, tokens, positions, attend)
    (weight, _), means = model.head_weights(), []
    for depth, states in enumerate(found, start=1):
        wanted = shifted_targets(targets, segments, depth).reshape(-1)
        loss = summed_loss(states.reshape(len(wanted), -1), weight, None, wanted)
        means.append(loss / jnp.sum(wanted != IGNORED))
    return jnp.stack(means)


def test_losses_match_float64_document_by_document(model, batch, rng):
    tokens, _, _, targets = batch
    hidden = rng.normal(size=(ROWS, LENGTH, model.config.hidden_size)).astype(np.float32)
    table = numbers(model.embed.weight)
    sums, counts = np.zeros(DEPTHS), np.zeros(DEPTHS, int)
    for row, lengths in enumerate(DOCUMENTS):
        for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            words, learnt = tokens[row, start : start + length], targets[row, start : start + length]
            states = hidden[row, start : start + length].astype(np.float64)
            for depth, block in enumerate(model.mtp, start=1):
                states = states[: length - depth]  # those that have a token t + depth
                if not len(states):
                    break
                x = exact_block(model, block, states, table[words[depth:]])
                states = norm(x, model.norm.weight, model.config.rms_norm_eps)
                logits = states @ table.T
                for place, target in enumerate(learnt[depth:]):
                    if target != IGNORED:
                        sums[depth - 1] += np.log(np.exp(logits[place]).sum()) - logits[place, target]
                        counts[depth - 1] += 1
    np.testing.assert_allclose(jax.jit(losses)(model, hidden, batch), sums / counts, rtol=1e-5)


def test_an_int8_embedding(model, batch, rng):
    """Losses, and their gradient by the hidden states, are those of the embedding that it stands for."""
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, model.config.hidden_size)), jnp.float32)
    config = dataclasses.replace(model.config, quantize="int8", quantize_embedding=True)
    small = Ernie(config, jnp.float32)
    initialize(small, single(), seed=6, scale=0.2)
    table = dequantize(small.embed.kernel)
    small.mtp, small.norm = model.mtp, model.norm
    written_out = nnx.clone(model)
    written_out.embed.weight.set_value(jnp.asarray(table))
    run = jax.jit(jax.value_and_grad(lambda hidden, model: losses(model, hidden, batch).sum()))
    found, expected = run(hidden, small), run(hidden, written_out)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_targets_stay_in_their_document():
    targets = jnp.array([[1, 2, IGNORED, 4, IGNORED, 6, IGNORED, IGNORED]])
    segments = jnp.array([[0, 0, 0, 1, 1, 2, -1, -1]])
    none = IGNORED
    np.testing.assert_array_equal(
        shifted_targets(targets, segments, 1), [[2, none, none, none, none, none, none, none]]
    )
    np.testing.assert_array_equal(shifted_targets(targets, segments, 2), [[none] * 8])
    np.testing.assert_array_equal(shifted_targets(targets, segments, 9), [[none] * 8])


def test_every_weight_of_a_depth_learns(model, batch, rng):
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, model.config.hidden_size)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda model: losses(model, hidden, batch).mean()))(model)
    for block in gradient.mtp:
        for leaf in jax.tree.leaves(block):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
