"""The sampler against a float64, sort-based NumPy reference that shares no code with it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.engine import sampling
from ernie_jax.engine.sampling import Features, SamplingParams, build_rows, record_tokens, sample, write_rows
from ernie_jax.errors import UserError

GREEDY = SamplingParams(temperature=0)
EVERYTHING = Features(
    random=True, top_k=True, top_p=True, min_p=True, bias_width=8, penalties=True, logprobs=True, top_logprobs=20
)


@pytest.fixture
def rng():
    """Give fresh inputs on every run; the seed is printed, and pytest shows it when a test fails."""
    seed = np.random.SeedSequence().entropy % 2**32
    print("numpy seed", seed)
    return np.random.default_rng(seed)


def run(logits, params, steps=0, *, seeds=None, prompts=None, outputs=None, valid=None, features=None):
    """Sample once through the public functions, as the engine does."""
    rows, vocab = logits.shape
    features = features or Features.of(params)
    seeds = range(rows) if seeds is None else seeds
    state = build_rows(params, seeds, prompts or [()] * rows, outputs, features=features, vocab_size=vocab)
    steps = jnp.broadcast_to(jnp.asarray(steps, jnp.int32), rows)
    return jitted(jnp.asarray(logits), state, steps, features=features, valid_vocab=valid or vocab)


jitted = jax.jit(sample, static_argnames=("features", "valid_vocab"))


# The reference ------------------------------------------------------------------------------------------------------


def reference_scores(logits, p, prompt, output, valid):
    """Bias, penalties and mask of one row in float64. [V]"""
    scores = np.array(logits, np.float64)
    for token, bias in p.logit_bias.items():
        scores[token] += bias
    for token in set(prompt) | set(output):
        scores[token] *= 1 / p.repetition_penalty if scores[token] > 0 else p.repetition_penalty
    for token in set(output):
        scores[token] -= p.frequency_penalty * list(output).count(token) + p.presence_penalty
    scores[valid:] = -np.inf
    return scores


def reference_filter(scores, p):
    """Temperature and filters of one row by sorting: log-weights, who is kept, and who lies on a rounding edge. [V]"""
    scaled = (scores - scores.max()) / p.temperature
    weights = np.exp(scaled)
    descending = np.sort(scaled)[::-1]
    kept, edge = np.ones(len(scores), bool), np.zeros(len(scores), bool)
    if p.top_k:
        last = descending[min(p.top_k, len(scores)) - 1]
        kept = scaled >= last
        edge = (scaled != last) & (abs(scaled - last) < 1e-5) if last > -np.inf else edge
        weights = np.where(kept, weights, 0)
    if p.top_p < 1:
        # A token stays if the mass of all strictly likelier ones has not yet reached top_p.
        values, inverse = np.unique(scaled, return_inverse=True)
        mass = np.bincount(inverse, weights=weights)[::-1]
        before = ((np.cumsum(mass) - mass) / mass.sum())[::-1][inverse]
        kept &= (before < p.top_p) | (scaled == 0)
        edge |= abs(before - p.top_p) < 1e-5
    if p.min_p:
        kept &= weights >= p.min_p
        edge |= abs(weights - p.min_p) < 1e-5
    return scaled, kept, edge


def grid_logits(rng, rows, vocab):
    """Draw logits on a grid: many ties, exact arithmetic, some at -inf."""
    logits = np.round(rng.normal(0, 3, (rows, vocab)) * 8) / 8
    logits[rng.random((rows, vocab)) < 0.05] = -np.inf
    return logits.astype(np.float32)


# Filters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["top_k", "top_p", "min_p", "all"])
@pytest.mark.parametrize("ties", [True, False])
def test_filters_keep_what_a_sort_keeps(rng, stage, ties):
    rows, vocab = 8, int(rng.integers(1000, 2000))
    logits = grid_logits(rng, rows, vocab) if ties else rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    params = [
        SamplingParams(
            temperature=rng.choice([0.5, 1, 2]),
            top_k=rng.integers(1, vocab // 2) if stage in ("top_k", "all") else 0,
            top_p=rng.uniform(0.05, 0.99) if stage in ("top_p", "all") else 1,
            min_p=rng.uniform(1e-3, 0.2) if stage in ("min_p", "all") else 0,
        )
        for _ in range(rows - 1)
    ]
    params.append(SamplingParams())  # a row that asks for no filter, in a program that has them
    features = Features.of(params)
    state = build_rows(params, [0] * rows, [()] * rows, features=features, vocab_size=vocab)
    scaled = np.array([(row - row.max()) / np.float32(p.temperature) for row, p in zip(logits, params, strict=True)])
    filtered = np.array(jax.jit(sampling._filter, static_argnums=2)(jnp.asarray(scaled), state, features))
    dropped_somewhere = False
    for row, p in enumerate(params):
        exact, kept, edge = reference_filter(logits[row].astype(np.float64), p)
        exact[~kept] = -np.inf
        np.testing.assert_allclose(filtered[row][~edge], exact[~edge], rtol=1e-6)
        assert edge.sum() < vocab / 10
        dropped_somewhere |= not kept.all()
    assert dropped_somewhere


@pytest.mark.parametrize("k", [1, 2, 37, 999, 1000, 5000])
def test_top_k_keeps_exactly_k_distinct_scores(rng, k):
    ranks = rng.permuted(np.tile(np.arange(1000, dtype=np.int32), (4, 1)), axis=1)
    scores = -(np.float32(1).view(np.int32) + ranks).view(np.float32)  # neighbouring floats from -1 down
    features = Features(random=True, top_k=True)
    state = build_rows([SamplingParams(top_k=k)] * 4, [0] * 4, [()] * 4, features=features, vocab_size=1000)
    filtered = sampling._filter(jnp.asarray(scores), state, features)
    np.testing.assert_array_equal(filtered, np.where(ranks < k, scores, -np.inf))


def test_nothing_is_sorted():
    features = dataclasses.replace(EVERYTHING, top_logprobs=0)
    state = build_rows([GREEDY] * 2, [0] * 2, [()] * 2, features=features, vocab_size=512)
    traced = jitted.trace(jnp.zeros((2, 512)), state, jnp.zeros(2, jnp.int32), features=features, valid_vocab=500)
    assert " sort[" not in str(traced.jaxpr)


# The whole chain ----------------------------------------------------------------------------------------------------


def test_chain_draws_the_reference_token(rng):
    """Seeds are a contract: key = fold_in(key(seed), index), so the reference can add the very same noise."""
    rows, vocab = 8, int(rng.integers(1000, 2000))
    valid = vocab - 57
    compared = 0
    for dtype in (jnp.float32, jnp.bfloat16):
        logits = np.array(jnp.asarray(rng.normal(0, 2, (rows, vocab)), dtype).astype(jnp.float32))
        logits[rng.random((rows, vocab)) < 0.05] = -np.inf
        prompts = [rng.integers(0, vocab, rng.integers(1, 300)).tolist() for _ in range(rows)]
        outputs = [rng.integers(0, 50, rng.integers(0, 200)).tolist() for _ in range(rows)]
        seeds = [int(seed) for seed in rng.integers(0, 2**63, rows)]
        params = [
            SamplingParams(
                temperature=rng.uniform(0.3, 1.5),
                top_k=rng.integers(0, 400),
                top_p=rng.uniform(0.5, 1),
                min_p=rng.choice([0, rng.uniform(0, 0.05)]),
                repetition_penalty=rng.uniform(0.7, 1.5),
                frequency_penalty=rng.uniform(-0.5, 0.5),
                presence_penalty=rng.uniform(-1, 1),
                logit_bias={int(token): rng.uniform(-5, 5) for token in rng.integers(0, vocab, rng.integers(0, 9))},
            )
            for _ in range(rows)
        ]
        params[3] = dataclasses.replace(params[3], temperature=0)
        for step in (0, 1, 77):
            got = run(
                jnp.asarray(logits, dtype), params, step, seeds=seeds, prompts=prompts, outputs=outputs, valid=valid
            )
            for row, p in enumerate(params):
                scores = reference_scores(logits[row], p, prompts[row], outputs[row], valid)
                edge = np.zeros(vocab, bool)
                if not p.is_greedy:
                    scores, kept, edge = reference_filter(scores, p)
                    data = jnp.array([seeds[row] >> 32, seeds[row] & 0xFFFFFFFF], jnp.uint32)
                    key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), step)
                    scores = scores + np.array(jax.random.gumbel(key, (vocab,), jnp.float32, mode="high"))
                    scores[~kept & ~edge] = -np.inf
                second, best = np.argsort(scores)[-2:]
                if scores[best] - scores[second] > 1e-3 and not edge[best]:  # else rounding may decide
                    assert got.tokens[row] == best, (dtype, step, row, p)
                    compared += 1
    assert compared > 36  # of 48


def chi_square(tokens, probabilities):
    """Compare counts with expectations; returns the statistic's distance from its mean in standard deviations."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(tokens)
    freedom = possible.sum() - 1
    return (((counts[possible] - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("stream", ["seeds", "steps"])
@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(),
        SamplingParams(temperature=1.7, top_k=9),
        SamplingParams(temperature=0.8, top_p=0.8),
        SamplingParams(min_p=0.1, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={2: 1.5, 7: -3}),
    ],
)
def test_frequencies_follow_the_distribution(p, stream):
    draws, vocab, valid = 20_000, 32, 29
    rng = np.random.default_rng(5)
    logits, prompt, output = rng.normal(0, 1.2, vocab).astype(np.float32), [1, 2, 3], [3, 4, 4]
    many, order = np.tile(logits, (draws, 1)), np.arange(draws)
    seeds, steps = (order, 0) if stream == "seeds" else ([1234] * draws, order)
    got = run(many, [p] * draws, steps, seeds=seeds, prompts=[prompt] * draws, outputs=[output] * draws, valid=valid)
    scaled, kept, edge = reference_filter(reference_scores(logits, p, prompt, output, valid), p)
    assert not edge.any()
    weights = np.where(kept, np.exp(scaled), 0)
    assert chi_square(got.tokens, weights / weights.sum()) < 4
    wrong = np.roll(weights, 1) + 1e-9  # the bound is not one that anything passes
    assert chi_square(got.tokens, wrong / wrong.sum()) > 100


def test_limits_are_greedy(rng):
    logits = rng.normal(0, 0.1, (8, 1500)).astype(np.float32)
    limits = [{"temperature": 1e-30}, {"top_k": 1}, {"top_p": 0}, {"min_p": 1}]
    params = [SamplingParams(**fields) for fields in limits] * 2
    np.testing.assert_array_equal(run(logits, params).tokens, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_greedy_takes_the_lowest_id_on_ties_beside_random_rows(rng, dtype):
    logits = rng.normal(0, 1, (8, 1200)).astype(np.float32)
    first = rng.integers(0, 600, 8)
    for row in range(8):
        logits[row, [first[row], first[row] + 1, 1199]] = 9.5
    logits = jnp.asarray(logits, dtype)
    hot = SamplingParams(temperature=10, top_k=500, top_p=0.99)
    mixed = [GREEDY, hot] * 4
    np.testing.assert_array_equal(run(logits, [GREEDY] * 8).tokens, first)
    np.testing.assert_array_equal(run(logits, mixed).tokens[::2], first[::2])
    assert (np.array(run(logits, mixed).tokens[1::2]) != first[1::2]).any()


def test_impossible_tokens_are_never_chosen():
    vocab, valid, rows = 1100, 1024, 256
    logits = np.full((rows, vocab), -np.inf, np.float32)
    logits[:, [3, 5, 8]] = 0
    logits[:, valid:] = 50
    bias = {1030: 100.0, 1099: 100.0, 8: -100.0}
    biased = SamplingParams(temperature=3, top_k=50, top_p=0.999, logit_bias=bias, logprobs=True, top_logprobs=3)
    params = [SamplingParams(), biased, dataclasses.replace(biased, temperature=0), SamplingParams(temperature=100)]
    got = run(logits, params * (rows // 4), valid=valid)
    for kind in range(4):
        assert set(np.array(got.tokens[kind::4]).tolist()) == ({3, 5, 8}, {3, 5}, {3}, {3, 5, 8})[kind]
    assert got.logprob.max() < -49  # the mass is on the masked ids, yet they are not listed either
    assert got.top_ids.max() < valid and set(np.array(got.top_ids[:, :3]).ravel().tolist()) == {3, 5, 8}


# Seeds --------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_own_row_only(rng):
    steps = range(0, 40, 8)
    logits = rng.normal(0, 2, (8, 1300)).astype(np.float32)
    p = SamplingParams(temperature=1.2, top_p=0.95)
    others = [SamplingParams(temperature=0.5, top_k=3, presence_penalty=1, logit_bias={4: 2}), GREEDY]
    for step in steps:
        alone = run(logits[5:6], [p], step, seeds=[99])
        crowd_steps, crowd_seeds = [1, 2, 3, 4, 5, step, 7, 8], [7] * 5 + [99] + [8] * 2
        crowd = run(logits, [*others, p, *others, p, *others], crowd_steps, seeds=crowd_seeds)
        assert alone.tokens[0] == crowd.tokens[5]


def test_seeds_and_steps_give_different_draws(rng):
    logits = np.tile(rng.normal(0, 1, 1500).astype(np.float32), (64, 1))
    p = [SamplingParams()] * 64
    base = np.array(run(logits, p, range(64), seeds=[3] * 64).tokens)
    assert len(set(base.tolist())) > 16
    for seed in (4, 3 + 2**32, 2**64 - 1):
        assert (np.array(run(logits, p, range(64), seeds=[seed] * 64).tokens) != base).mean() > 0.5


# State --------------------------------------------------------------------------------------------------------------


def test_penalties_follow_the_output_through_steps(rng):
    rows, vocab, length = 8, 1000, 12
    logits = rng.normal(0, 1, (length, rows, vocab)).astype(np.float32)
    logits[:, :, :6] += 4  # a handful of tokens compete, so that the penalties decide
    logits[::2] -= 12  # and every other step has no positive logit
    params = [
        SamplingParams(temperature=0),
        *[SamplingParams(temperature=0, repetition_penalty=r) for r in (0.8, 1.4, 2)],
        *[SamplingParams(temperature=0, frequency_penalty=f) for f in (0.3, -0.2)],
        SamplingParams(temperature=0, presence_penalty=1.5),
        SamplingParams(temperature=0, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.6),
    ]
    prompts = [rng.integers(0, 6, 3).tolist() for _ in params]
    features = Features.of(params)
    state = jax.device_put(build_rows(params, [0] * rows, prompts, features=features, vocab_size=vocab))

    @jax.jit
    def step(logits, state, index, active):
        output = sample(logits, state, index, features=features, valid_vocab=vocab)
        return output.tokens, record_tokens(state, output.tokens, active)

    outputs = [[] for _ in params]
    changed = 0
    for index in range(length):
        active = rng.random(rows) < 0.8
        tokens, state = step(logits[index], state, jnp.full(rows, index), active)
        for row, p in enumerate(params):
            scores = reference_scores(logits[index, row], p, prompts[row], outputs[row], vocab)
            chosen = int(tokens[row])
            assert scores[chosen] >= scores.max() - 1e-5
            changed += chosen != logits[index, row].argmax()
            if active[row]:
                outputs[row].append(chosen)
    assert changed > 5
    rebuilt = build_rows(params, [0] * rows, prompts, outputs, features=features, vocab_size=vocab)
    jax.tree.map(np.testing.assert_array_equal, state, rebuilt)


def test_rows_are_written_into_slots_and_padding_is_dropped(rng):
    features = Features(random=True, top_k=True, bias_width=4, penalties=True)
    params = [
        SamplingParams(temperature=t, top_k=5, presence_penalty=1, logit_bias={int(t): t}) for t in (1, 2, 3, 4, 5)
    ]
    prompts = [[token] for token in range(5)]

    def rows(which):
        chosen = [params[i] for i in which], which, [prompts[i] for i in which], [prompts[i] for i in which]
        return build_rows(*chosen, features=features, vocab_size=100)

    state = write_rows(jax.device_put(rows([0, 1, 2, 3])), jnp.array([2, 0, 4]), rows([4, 1, 2]))
    jax.tree.map(np.testing.assert_array_equal, state, rows([1, 1, 4, 3]))


def test_without_penalties_there_is_nothing_to_count():
    state = build_rows([GREEDY], [0], [[1, 2]], features=Features(), vocab_size=10)
    assert record_tokens(state, jnp.array([3]), jnp.array([True])) is state
    assert state.bias_ids is None and state.in_prompt is None


def test_a_superset_of_features_changes_nothing(rng):
    logits = rng.normal(0, 2, (8, 1400)).astype(np.float32)
    params = [GREEDY, SamplingParams(), SamplingParams(temperature=0.7)] * 2 + [GREEDY] * 2
    expected = run(logits, params)
    got = run(logits, params, prompts=[[1, 2]] * 8, outputs=[[3]] * 8, features=EVERYTHING)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    assert expected.logprob is None and expected.top_ids is None and got.top_ids.shape == (8, 20)


def test_features_are_those_in_use():
    assert Features.of([]) == Features.of([GREEDY]) == Features()
    assert Features.of([SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)]) == Features()
    assert Features.of([GREEDY, SamplingParams(top_p=0.5)]) == Features(random=True, top_p=True)
    biased = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(5), 1), logprobs=True, top_logprobs=17)
    penalised = SamplingParams(top_k=2, min_p=0.5, frequency_penalty=0.1)
    assert Features.of([biased, penalised]) == dataclasses.replace(EVERYTHING, top_p=False)


def test_features_cover_what_has_every_stage_at_least_as_wide():
    assert EVERYTHING.covers(EVERYTHING) and EVERYTHING.covers(Features()) and not Features().covers(EVERYTHING)
    for field in dataclasses.fields(Features):
        less = dataclasses.replace(EVERYTHING, **{field.name: getattr(EVERYTHING, field.name) // 2})
        assert EVERYTHING.covers(less) and not less.covers(EVERYTHING)


# Log-probabilities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logprobs_are_those_of_the_raw_distribution(rng, dtype):
    rows, vocab = 8, 1700
    logits = jnp.asarray(rng.normal(0, 3, (rows, vocab)), dtype)
    p = SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias={3: 100}, logprobs=True, top_logprobs=8)
    params = [p, dataclasses.replace(p, logit_bias={})] * (rows // 2)
    got = run(logits, params, prompts=[[1, 2, 3]] * rows, valid=1650)
    raw = np.array(logits.astype(jnp.float32), np.float64)
    exact = raw - np.log(np.exp(raw).sum(-1, keepdims=True))  # over the whole vocabulary, masked ids included
    at = np.arange(rows)
    np.testing.assert_array_equal(got.tokens[::2], 3)
    np.testing.assert_allclose(got.logprob, exact[at, got.tokens], rtol=1e-5, atol=1e-5)
    best = np.argsort(-exact[:, :1650], axis=-1, kind="stable")[:, :8]
    np.testing.assert_array_equal(got.top_ids, best)
    np.testing.assert_allclose(got.top_logprobs, exact[at[:, None], best], rtol=1e-5, atol=1e-5)
    assert got.logprob.dtype == got.top_logprobs.dtype == jnp.float32 and got.tokens.dtype == jnp.int32


# SamplingParams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_new_tokens", 0, "from 1"),
        ("max_new_tokens", 2.5, "an integer"),
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", float("nan"), "from 0 to 100"),
        ("temperature", "hot", "a number"),
        ("temperature", True, "a number"),
        ("top_p", 1.5, "from 0 to 1"),
        ("top_k", -1, "from 0"),
        ("min_p", 2, "from 0 to 1"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("frequency_penalty", 2.5, "from -2 to 2"),
        ("presence_penalty", -3, "from -2 to 2"),
        ("seed", -1, "from 0 to 18446744073709551615"),
        ("seed", 1.0, "an integer"),
        ("logit_bias", [1, 2], "a mapping"),
        ("logit_bias", {"-4": 1}, "an integer from 0"),
        ("logit_bias", {7: 101}, "from -100 to 100"),
        ("stop", "", "not empty"),
        ("stop", ["a", 3], "a string"),
        ("stop_token_ids", 5, "a list"),
        ("stop_token_ids", [2, -1], "an integer from 0"),
        ("ignore_eos", 1, "true or false"),
        ("logprobs", 5, "true or false"),
        ("top_logprobs", 21, "from 0 to 20"),
        ("top_logprobs", 3, "needs logprobs"),
    ],
)
def test_bad_values_are_named(field, value, expected):
    with pytest.raises(UserError, match=f"sampling field {field}.*{expected}"):
        SamplingParams(**{field: value})


def test_from_dict_reads_json():
    line = '{"temperature": 1, "stop": "END", "logit_bias": {"12": -3}, "stop_token_ids": [4], "seed": null}'
    defaults = SamplingParams(top_p=0.8, seed=3, temperature=0)
    p = SamplingParams.from_dict(json.loads(line), defaults)
    expected = SamplingParams(top_p=0.8, seed=3, stop=("END",), stop_token_ids=(4,), logit_bias={12: -3.0})
    assert p == expected and p.stop == ("END",) and p.logit_bias == {12: -3.0}
    assert SamplingParams.from_dict({}) == SamplingParams()
    with pytest.raises(UserError, match="unknown sampling fields best_of, tempature; known are .*temperature"):
        SamplingParams.from_dict({"tempature": 1, "best_of": 2})


def test_ids_beyond_the_vocabulary_are_refused():
    SamplingParams(logit_bias={99: 1}, stop_token_ids=(0,)).check_vocabulary(100)
    for p in (SamplingParams(logit_bias={100: 1}), SamplingParams(stop_token_ids=[3, 100])):
        with pytest.raises(UserError, match="token id 100; ids go from 0 to 99"):
            p.check_vocabulary(100)
