"""The engine against the model's own cacheless forward pass."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ernie_jax.engine import Engine, EngineOptions, SamplingParams
from ernie_jax.engine.aot import decode_shape, mixed_shape, prefill_shape
from ernie_jax.engine.cache import abstract_pages, leave_gaps
from ernie_jax.errors import UserError
from ernie_jax.model import forward
from ernie_jax.sharding import single
from tests.engine.ties import collect, drain

GREEDY = SamplingParams(max_new_tokens=24, temperature=0.0)
LENGTH = 256


@pytest.fixture(scope="module")
def engine(tiny_model):
    """Small pages and chunks, so that every prompt crosses several."""
    return Engine(
        tiny_model,
        single(),
        EngineOptions(cache_tokens=1024, max_sequences=4, prefill_chunk=64, page_size=16),
        valid_vocab=300,
        stop_ids=frozenset({2}),
    )


@pytest.fixture(scope="module")
def logits(tiny_model):
    graphdef, state = nnx.split(tiny_model)
    run = jax.jit(lambda state, tokens: forward(nnx.merge(graphdef, state), tokens))

    def of(tokens):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(run(state, padded))[0, : len(tokens)]

    return of


def prompts_of(rng, *lengths):
    return [rng.integers(3, 300, length).tolist() for length in lengths]


def test_many_lengths_at_once_equal_the_cacheless_forward(engine, logits, rng):
    prompts = prompts_of(rng, 1, 5, 64, 65, 150, 17, 128, 3)  # more than there are slots, some longer than a chunk
    params = SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True, logprobs=True)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    events = drain(engine)
    for request, prompt in zip(requests, prompts, strict=True):
        tokens = [event.token for event in events[request]]
        assert len(tokens) == 24
        assert [e.finish_reason for e in events[request]] == [None] * 23 + ["length"]
        expected = logits(prompt + tokens)[len(prompt) - 1 : -1]
        best = expected[:, :300].max(-1)
        np.testing.assert_allclose(expected[np.arange(24), tokens], best, atol=1e-5)  # one of them at a tie
        logprobs = np.asarray(jax.nn.log_softmax(expected))[np.arange(24), tokens]
        np.testing.assert_allclose([e.logprob for e in events[request]], logprobs, atol=1e-5)
    assert engine.free_tokens == engine.cache_tokens


def test_scores_equal_the_cacheless_forward(engine, logits, rng):
    prompts = prompts_of(rng, 1, 2, 64, 200, 31, 65)
    scores = dict(engine.score(prompts))
    for index, prompt in enumerate(prompts):
        expected = np.asarray(jax.nn.log_softmax(logits(prompt)))[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scores[index], expected, atol=1e-5)
    assert engine.free_tokens == engine.cache_tokens


def test_scoring_that_is_stopped_early_frees_its_pages(engine, rng):
    scores = engine.score(prompts_of(rng, 5, 200, 150))
    next(scores)
    scores.close()
    assert engine.free_tokens == engine.cache_tokens


def test_a_stop_id_ends_a_sequence_at_once_and_surplus_tokens_are_dropped(engine, rng):
    (prompt,) = prompts_of(rng, 9)
    engine.submit(prompt, SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True))
    tokens = [event.token for event in drain(engine).popitem()[1]]
    first = tokens.index(tokens[10])
    request = engine.submit(prompt, SamplingParams(max_new_tokens=24, temperature=0.0, stop_token_ids=(tokens[10],)))
    events = drain(engine)[request]
    if 2 not in tokens[:first]:
        assert [e.token for e in events] == tokens[: first + 1]
        assert events[-1].finish_reason == "stop"


def test_what_else_is_in_the_batch_does_not_matter_for_a_seed(engine, rng):
    first, *others = prompts_of(rng, 40, 11, 90, 5)
    params = SamplingParams(max_new_tokens=16, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    alone = engine.submit(first, params)
    expected = [event.token for event in drain(engine)[alone]]
    noise = SamplingParams(max_new_tokens=30, temperature=2.0, frequency_penalty=1.0, top_logprobs=3, logprobs=True)
    for prompt in others:
        engine.submit(prompt, noise)
    events = {}
    for _ in range(3):
        engine.step()
    together = engine.submit(first, params)  # joins running sequences that need other sampler arrays
    assert [event.token for event in drain(engine, events)[together]] == expected


def test_penalties_see_every_generated_token(engine, rng):
    (prompt,) = prompts_of(rng, 12)
    params = SamplingParams(
        max_new_tokens=40, temperature=0.0, frequency_penalty=2.0, repetition_penalty=100.0, ignore_eos=True
    )
    request = engine.submit(prompt, params)
    tokens = [event.token for event in drain(engine)[request]]
    assert len(set(tokens)) == len(tokens)


def test_cancel_frees_the_pages_and_the_others_go_on(engine, rng):
    keep, drop = prompts_of(rng, 20, 30)
    expected = engine.submit(keep, GREEDY)
    expected = [e.token for e in drain(engine)[expected]]
    kept, dropped = engine.submit(keep, GREEDY), engine.submit(drop, GREEDY)
    events = {}
    for _ in range(8):
        collect(engine, events)
    engine.cancel(dropped)
    count = len(events.get(dropped, []))
    drain(engine, events)
    assert [e.token for e in events[kept]] == expected
    assert len(events.get(dropped, [])) == count
    assert engine.free_tokens == engine.cache_tokens


def test_the_step_writes_the_cache_in_place(engine, tiny_config):
    """No copy of the cache in the compiled step: it would cost the whole cache's bandwidth every token."""
    decode, prefill = decode_shape(tiny_config, single(), 1, 48, 16), prefill_shape(tiny_config, single(), 64, 64, 16)
    for step in (decode, prefill, mixed_shape(tiny_config, single(), 4, 64, 128, 16)):
        pages = abstract_pages(tiny_config, jnp.float32, 65, 16, single())
        text = engine._step.lower(step, pages, slots=4).compile().as_text()
        shape = "[65,16,4,16]"
        copies = [line for line in text.splitlines() if shape in line.split("(")[0] and " copy(" in line]
        assert shape in text
        assert not copies


def test_few_programs_are_compiled(tiny_model, rng):
    engine = Engine(tiny_model, single(), EngineOptions(cache_tokens=2048, max_sequences=4, prefill_chunk=64))
    for prompt in prompts_of(rng, *range(17, 60)):
        engine.submit(prompt, SamplingParams(max_new_tokens=3, temperature=0.0))
    drain(engine)
    # Decode with 1 or 4 rows; prefill alone or in rows of 8 with two paddings, and beside decoding in four sizes.
    assert engine._step.traces <= 9


@pytest.mark.parametrize(
    ("prompt", "params", "sentence"),
    [
        ([], GREEDY, "the prompt is empty"),
        ([320], GREEDY, "token id 320 is outside the vocabulary of 320"),
        ([-1], GREEDY, "token id -1 is outside"),
        ([1] * 1024, GREEDY, "exceeds the model's context of 1024"),
        ([1] * 1000, SamplingParams(max_new_tokens=1000), None),  # cut to the context
        ([1] * 10, SamplingParams(logit_bias={300: 1.0}), "logit_bias names token id 300"),
    ],
)
def test_bad_requests(engine, prompt, params, sentence):
    if sentence is None:
        engine.check(prompt, params)
        return
    with pytest.raises(UserError, match=sentence):
        engine.submit(prompt, params)
    assert not engine.has_work


def test_a_request_larger_than_the_cache_is_refused(tiny_model):
    engine = Engine(tiny_model, single(), EngineOptions(cache_tokens=128, max_sequences=1))
    with pytest.raises(UserError, match="raise --cache_tokens"):
        engine.submit([1] * 100, SamplingParams(max_new_tokens=100))


@pytest.mark.parametrize("field", ["cache_tokens", "max_sequences", "prefill_chunk", "page_size"])
def test_options_are_checked(field):
    with pytest.raises(UserError, match=f"{field} is 0"):
        EngineOptions(**{field: 0})


def test_bfloat16_runs_through_the_same_step(tiny_config, rng):
    from ernie_jax.model import Ernie, initialize

    model = Ernie(tiny_config, jnp.bfloat16)
    initialize(model, single(), seed=1)
    engine = Engine(model, single(), EngineOptions(cache_tokens=1024, max_sequences=2, prefill_chunk=32))
    requests = [engine.submit(prompt, GREEDY) for prompt in prompts_of(rng, 50, 3)]
    events = drain(engine)
    assert all(events[request][-1].finish_reason for request in requests)


def test_gaps_lie_between_arrays_that_stay():
    put = []
    layout = types.SimpleNamespace(platform="gpu", put=lambda array: put.append(array) or array)
    kept = leave_gaps(layout)
    assert [id(array) for array in kept] == [id(array) for array in put[::2]]  # behind each that stays one that goes
    sizes = [array.nbytes for array in put]
    assert sizes == sorted(sizes) and min(sizes) == 256 and max(sizes) > 2 * 27 * 64 * 4  # a step's counts of experts
    layout.platform = "tpu"
    assert leave_gaps(layout) == []
