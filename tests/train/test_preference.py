"""Preference losses of packed pairs, against float64 and against what Baidu's own code computes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ernie_jax.errors import UserError
from ernie_jax.train.data import Batch
from ernie_jax.train.losses import IGNORED
from ernie_jax.train.preference import (
    Answers,
    answers,
    interleaved,
    preference_objective,
    preference_sums,
    sides,
)
from ernie_jax.train.preference_options import VARIANTS, PreferenceOptions

ROWS, LENGTH, SEGMENTS = 8, 40, 4
PUBLISHED = {
    "sigmoid": {},
    "sigmoid_smoothed": {"label_smoothing": 0.1},
    "sigmoid_sums": {"normalize_lengths": False},
    "hinge": {"variant": "hinge"},
    "ipo": {"variant": "ipo"},
    "simpo": {"variant": "simpo", "label_smoothing": 0.1},
    "dpop": {"variant": "dpop"},
}


@pytest.fixture(scope="module")
def published():
    with np.load(pathlib.Path(__file__).parent / "published" / "expected.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", PUBLISHED)
def test_variants_match_the_published_code(name, published):
    """Theirs has a pair's answers one after the other in one row; of ours each has a row of its own and a segment."""
    options = PreferenceOptions(**PUBLISHED[name], sft_weight=0.25)
    labels, pairs = published["labels"], published["pairs"]
    places = np.arange(len(labels))
    targets, segments = np.full((2, len(labels)), IGNORED), np.full((2, len(labels)), -1)
    for segment, (_, begin, middle, end) in enumerate(pairs):
        for side, (start, stop) in enumerate([(begin, middle), (middle, end)]):
            answer = (places >= start) & (places < stop)
            targets[side, answer], segments[side, answer] = labels[answer], segment

    def both_sides(logits):
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
        return sides(answers(jnp.stack([logprobs, logprobs]), targets, segments, len(pairs)))

    reference = [side.logprobs for side in both_sides(published["reference_logits"])]

    def loss(logits):
        chosen, rejected = both_sides(logits)
        sums = preference_sums(options, chosen, rejected, reference, jnp.ones((1, len(pairs)), bool))
        return preference_objective(options, sums, len(pairs), chosen.lengths.sum())

    value, pull = jax.value_and_grad(loss)(published["preference_logits"])
    np.testing.assert_allclose(value, published[name], rtol=2e-6)
    scale = np.abs(published[f"{name}_gradient"]).max()
    np.testing.assert_allclose(pull, published[f"{name}_gradient"], atol=3e-6 * scale)


def exact_sums(options, chosen, rejected, reference, real):
    """Return the sums of `preference_sums` in float64, of pairs one by one."""
    sums = np.zeros(6)
    for place in np.argwhere(real):
        at = tuple(place)
        lengths = np.array([chosen.lengths[at], rejected.lengths[at]], np.float64)
        policy = np.array([chosen.logprobs[at], rejected.logprobs[at]], np.float64)
        before = np.array([reference[0][at], reference[1][at]], np.float64) * (options.variant != "simpo")
        scale = np.ones(2)
        if options.variant in ("ipo", "simpo"):
            scale = 1 / lengths
        elif options.normalize_lengths:
            scale = lengths.mean() / lengths
        gained = (policy - before) * scale
        lead, beta = gained[0] - gained[1], options.beta
        if options.variant == "hinge":
            loss = max(0, 1 - beta * lead)
        elif options.variant == "ipo":
            loss = (lead - 0.5 / beta) ** 2
        elif options.variant == "dpop":
            loss = np.log1p(np.exp(-beta * (lead - options.dpop_weight * max(0, -gained[0]))))
        else:
            score = beta * lead - options.simpo_margin * (options.variant == "simpo")
            right, wrong = np.log1p(np.exp(-score)), np.log1p(np.exp(score))
            loss = (1 - options.label_smoothing) * right + options.label_smoothing * wrong
        sums += [loss, *-policy, *(beta * gained), gained[0] > gained[1]]
    return sums


@pytest.fixture
def packed(rng):
    """Rows of segments and padding, interleaved: log-probabilities, targets, segments."""
    segments = np.sort(rng.integers(0, SEGMENTS, (2 * ROWS, LENGTH)), axis=1)
    segments[rng.random(2 * ROWS) < 0.3, -LENGTH // 4 :] = -1
    targets = np.where((rng.random(segments.shape) < 0.6) & (segments >= 0), 7, IGNORED)
    logprobs = -rng.exponential(size=segments.shape).astype(np.float32)
    return logprobs, targets, segments


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalize", [True, False])
def test_sums_match_float64(variant, normalize, packed, rng):
    logprobs, targets, segments = packed
    options = PreferenceOptions(variant, beta=0.3, normalize_lengths=normalize, dpop_weight=2.0)
    both = answers(logprobs, targets, segments, SEGMENTS)
    for row, segment in np.ndindex(both.lengths.shape):
        mine = (segments[row] == segment) & (targets[row] != IGNORED)
        assert both.lengths[row, segment] == mine.sum()
        np.testing.assert_allclose(both.logprobs[row, segment], logprobs[row, mine].sum(dtype=np.float64), rtol=1e-5)
    chosen, rejected = jax.tree.map(np.asarray, sides(both))
    real = (chosen.lengths > 0) & (rejected.lengths > 0) & (rng.random(chosen.lengths.shape) < 0.8)
    reference = [side.logprobs + rng.normal(size=real.shape).astype(np.float32) for side in (chosen, rejected)]
    sums = preference_sums(options, chosen, rejected, reference, real)
    np.testing.assert_allclose(sums, exact_sums(options, chosen, rejected, reference, real), rtol=1e-4, atol=1e-4)


def objective(logprobs, targets, segments, reference, real):
    options = PreferenceOptions(sft_weight=0.5)
    chosen, rejected = sides(answers(logprobs, targets, segments, SEGMENTS))
    sums = preference_sums(options, chosen, rejected, reference, real)
    return preference_objective(options, sums, real.sum(), chosen.lengths.sum(where=real)), sums


def test_eight_devices_equal_one_and_padding_has_no_gradient(packed):
    logprobs, targets, segments = packed
    both = answers(logprobs, targets, segments, SEGMENTS)
    chosen, rejected = sides(both)
    real = np.array((chosen.lengths > 0) & (rejected.lengths > 0))
    real[1] = False
    arguments = logprobs, targets, segments, [np.asarray(side.logprobs) - 1 for side in (chosen, rejected)], real
    step = jax.jit(jax.value_and_grad(objective, has_aux=True))
    alone = step(*arguments)
    rows = NamedSharding(Mesh(jax.devices()[:8], "data"), P("data"))
    sharded = step(*jax.device_put(arguments, rows))
    for one, eight in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6)
    _, pull = alone
    counted = (targets != IGNORED) & np.take_along_axis(np.repeat(real, 2, axis=0), np.maximum(segments, 0), axis=1)
    np.testing.assert_array_equal(np.asarray(pull) != 0, counted)


def test_equal_to_the_reference_is_log_two():
    side = Answers(jnp.array([[-3.0, -700.0]]), jnp.array([[2, 900]]))
    sums = preference_sums(PreferenceOptions(), side, side, (side.logprobs, side.logprobs), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(sums.loss, 2 * np.log(2), rtol=1e-6)


def test_interleaved_rows_stay_in_order():
    chosen, rejected = (Batch(*(np.full((2, 3), side + part) for part in range(4))) for side in (0, 10))
    chosen.tokens[1] = 5
    both = interleaved(chosen, rejected)
    np.testing.assert_array_equal(both.tokens[:, 0], [0, 10, 5, 10])
    np.testing.assert_array_equal(both.targets[:, 0], [3, 13, 3, 13])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "kto"}, "preference.variant is 'kto': choose one of sigmoid"),
        ({"beta": 0}, "preference.beta is 0: it must be above 0"),
        ({"beta": "much"}, "preference.beta must be a number, found 'much'"),
        ({"sft_weight": -1.0}, "preference.sft_weight is -1.0: it must be a number from 0 up"),
        ({"label_smoothing": 0.5}, "preference.label_smoothing is 0.5: it must be from 0 to below 0.5"),
        ({"variant": "hinge", "label_smoothing": 0.1}, "preference.label_smoothing is for sigmoid and simpo"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(UserError, match=message):
        PreferenceOptions(**fields)
