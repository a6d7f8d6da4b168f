"""Continuous batching on the small model: whoever joins, leaves or waits, every request says what it says alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax.engine import Engine, EngineOptions, SamplingParams
from ernie_jax.engine import engine as engine_module
from ernie_jax.errors import UserError
from ernie_jax.ops import packed_attention
from ernie_jax.sharding import single
from tests.engine.ties import collect, drain, expected_run, single_run

PAGE = 16
SMALL = EngineOptions(cache_tokens=20 * PAGE, max_sequences=4, prefill_chunk=64, mixed_chunk=16, page_size=PAGE)
AMPLE = dataclasses.replace(SMALL, cache_tokens=128 * PAGE, prefix_caching=False)


@pytest.fixture(scope="module")
def alone(tiny_model):
    """An engine that has room for all and remembers nothing."""
    return Engine(tiny_model, single(), AMPLE, valid_vocab=300, stop_ids=frozenset({2}))


@pytest.fixture
def engine(tiny_model):
    """One in which pages run out."""
    return Engine(tiny_model, single(), SMALL, valid_vocab=300, stop_ids=frozenset({2}))


def tokens_of(events):
    return [event.token for event in events]


@pytest.fixture(scope="module")
def check(alone, tiny_model):
    """Hold the tokens that were found to those of the same request alone."""

    def check(found, prompt, params, **options):
        assert found == expected_run(alone, tiny_model, prompt, params, found, **options)

    return check


def draw_params(rng, most):
    """Draw settings of every kind, always with a seed."""
    kind, seed = rng.integers(4), int(rng.integers(1 << 40))
    new = int(rng.integers(1, most))
    if kind == 0:
        return SamplingParams(max_new_tokens=new, temperature=0.0)
    if kind == 1:
        return SamplingParams(max_new_tokens=new, temperature=1.0, top_p=0.9, seed=seed, ignore_eos=True)
    if kind == 2:
        return SamplingParams(
            max_new_tokens=new, temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.7, ignore_eos=True
        )
    return SamplingParams(
        max_new_tokens=new, temperature=1.3, top_k=40, presence_penalty=0.5, seed=seed, logprobs=True, ignore_eos=True
    )


def test_steps_of_few_sequences_run_further_ahead(engine, monkeypatch, rng):
    monkeypatch.setattr(engine_module, "_FEW", 2)
    params = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
    for count, ahead in (2, 4), (3, 2):
        for _ in range(count):
            engine.submit(rng.integers(3, 300, 5).tolist(), params)
        for _ in range(12):
            engine.step()
        assert len(engine._in_flight) == ahead
        drain(engine)


def test_whoever_comes_and_goes_every_request_says_what_it_says_alone(tiny_model, engine, alone, monkeypatch, rng):
    monkeypatch.setattr(engine_module, "_FEW", 2)  # so that steps run now so far ahead and now further
    requests, events, cancelled = {}, {}, set()
    system = rng.integers(3, 300, 40).tolist()  # many prompts begin alike
    for _ in range(250):
        if rng.random() < 0.15:
            prompt = (system[: rng.integers(41)] if rng.random() < 0.6 else []) + rng.integers(
                3, 300, rng.integers(1, 90)
            ).tolist()
            params = draw_params(rng, 60)
            requests[engine.submit(prompt, params, priority=int(rng.integers(2)))] = prompt, params
        if rng.random() < 0.02 and requests:
            request = int(rng.choice(list(requests)))
            engine.cancel(request)
            cancelled.add(request)
        collect(engine, events)
    drain(engine, events)
    stats = engine.stats()
    print(stats)
    assert len(requests) > 10 and stats.preemptions and stats.cached_tokens
    assert (stats.running, stats.waiting, stats.used_pages) == (0, 0, 0)
    assert stats.free_pages + stats.cached_pages == 20 and engine.free_tokens == engine.cache_tokens
    for request, (prompt, params) in requests.items():
        found = events.get(request, [])
        expected = expected_run(alone, tiny_model, prompt, params, tokens_of(found))
        assert tokens_of(found) == expected[: len(found)]
        if request not in cancelled:
            assert len(found) == len(expected) and found[-1].finish_reason in ("stop", "length")
    assert stats.generated_tokens == sum(map(len, events.values()))


def test_a_wrong_token_is_not_taken_for_a_tie(alone, tiny_model):
    prompt, params = list(range(10, 30)), SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
    right = single_run(alone, prompt, params)
    wrong = right[:4] + [3 + (right[4] + 1) % 297] + right[5:]
    assert expected_run(alone, tiny_model, prompt, params, right) == right
    assert expected_run(alone, tiny_model, prompt, params, wrong) == right


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_restores_penalties_and_seeds(tiny_model, check, rng, prefix_caching):
    options = dataclasses.replace(SMALL, cache_tokens=10 * PAGE, prefix_caching=prefix_caching)
    engine = Engine(tiny_model, single(), options, valid_vocab=300)
    params = SamplingParams(
        max_new_tokens=80, temperature=0.9, seed=5, frequency_penalty=0.5, repetition_penalty=1.3, ignore_eos=True
    )
    prompts = [rng.integers(3, 300, 30).tolist() for _ in range(3)]
    requests = [engine.submit(prompt, params) for prompt in prompts]
    events = drain(engine)
    assert engine.stats().preemptions
    assert engine.stats().prompt_tokens == 90  # not those that were computed again
    for request, prompt in zip(requests, prompts, strict=True):
        check(tokens_of(events[request]), prompt, params)


def test_a_stream_goes_on_beside_a_long_prompt(alone, check, rng):
    short, long = (rng.integers(3, 300, length).tolist() for length in (10, 400))
    params = SamplingParams(max_new_tokens=60, temperature=0.0, ignore_eos=True)
    events = {}
    stream = alone.submit(short, params)
    while stream not in events:
        collect(alone, events)
    other = alone.submit(long, params)
    steps = 0
    while alone.progress(other).computed < 400:
        before = len(events[stream])
        collect(alone, events)
        assert len(events[stream]) > before  # at every step; at the first all that short steps left
        steps += 1
    assert steps >= 25
    drain(alone, events)
    check(tokens_of(events[stream]), short, params)
    check(tokens_of(events[other]), long, params)
    assert alone.progress(other) is None


def test_a_conversation_reuses_its_turns(engine, check, rng):
    prompt, params = rng.integers(3, 300, 20).tolist(), SamplingParams(max_new_tokens=15, temperature=0.0)
    params = dataclasses.replace(params, ignore_eos=True)
    for turn in range(6):
        request = engine.submit(prompt, params)
        events = drain(engine)[request]
        check(tokens_of(events), prompt, params)
        # All full pages of the last turn, whose last token was sampled and perhaps not fed.
        assert all(event.cached_tokens == (len(prompt) - 10) // PAGE * PAGE * (turn > 0) for event in events)
        prompt = prompt + tokens_of(events) + rng.integers(3, 300, 9).tolist()
    stats = engine.stats()
    assert stats.cached_tokens > stats.prompt_tokens / 2 and stats.preemptions == 0


def test_a_cancelled_prompt_leaves_only_whole_pages(engine, check, rng):
    prompt = rng.integers(3, 300, 150).tolist()
    params = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
    request = engine.submit(prompt, params)
    engine.step()  # the first chunk
    engine.cancel(request)
    assert engine.stats().cached_pages == 4 and engine.stats().used_pages == 0
    again = engine.submit(prompt, params)
    events = drain(engine)
    assert request not in events and events[again][0].cached_tokens == 64
    check(tokens_of(events[again]), prompt, params)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_fails_is_survived(engine, check, rng, monkeypatch, when):
    prompts = [rng.integers(3, 300, 60).tolist() for _ in range(3)]
    params = SamplingParams(max_new_tokens=20, temperature=0.0, frequency_penalty=1.0, ignore_eos=True)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    real, calls = engine._step.forward, []

    def fail(pages, *arguments):
        calls.append(None)
        if len(calls) == 4:
            if when == "after":
                real(pages, *arguments)  # the pages are gone
            raise RuntimeError("injected")
        return real(pages, *arguments)

    monkeypatch.setattr(engine._step, "forward", fail)
    with pytest.raises(RuntimeError, match="injected"):
        drain(engine)
    assert engine.reset() == requests
    assert not engine.has_work and engine.stats().free_pages == 20
    again = [engine.submit(prompt, params) for prompt in prompts]
    events = drain(engine)
    for request, prompt in zip(again, prompts, strict=True):
        assert events[request][0].cached_tokens == 0
        check(tokens_of(events[request]), prompt, params)


def test_scoring_leaves_the_known_pages_alone(engine, alone, check, rng):
    prompt = rng.integers(3, 300, 60).tolist()
    params = SamplingParams(max_new_tokens=4, temperature=0.0)
    single_run(engine, prompt, params)
    known = engine.stats().cached_pages
    assert dict(engine.score([prompt[:40]]))[0] == pytest.approx(dict(alone.score([prompt[:40]]))[0], abs=1e-5)
    assert engine.stats().cached_pages == known == 3
    check(single_run(engine, prompt, params), prompt, params)


def test_steps_of_unchanged_sequences_follow_on_the_device(tiny_model, rng, monkeypatch):
    options = dataclasses.replace(AMPLE, prefix_caching=True)
    engine = Engine(tiny_model, single(), options, valid_vocab=300)
    sent, place = [], engine._step.place
    monkeypatch.setattr(engine._step, "place", lambda packed: sent.append(packed) or place(packed))
    params = SamplingParams(max_new_tokens=200, temperature=0.0, ignore_eos=True)
    for length in (10, 20, 30):
        engine.submit(rng.integers(3, 300, length).tolist(), params)
    drain(engine)
    assert engine.stats().steps >= 200
    assert len(sent) <= 14  # a prompt step; pages ahead and wider tables; the ends


class Counting:
    """A toy grammar: the next token is the last one plus one to three, from 10 on, until 60 is passed."""

    free = False

    def __init__(self):
        self.last = 10

    def mask(self, out):
        out[:] = 0
        for token in range(self.last + 1, self.last + 4):
            out[token // 32] |= np.uint32(1 << token % 32).view(np.int32)

    def accept(self, token):
        fits = self.last < token < self.last + 4
        self.last = token
        return fits

    @property
    def finished(self):
        return self.last > 60


def test_guided_rows_obey_and_the_others_do_not_notice(engine, check, rng):
    prompts = [rng.integers(3, 300, 30).tolist() for _ in range(5)]
    params = [draw_params(rng, 60) for _ in prompts]
    guided = [
        SamplingParams(max_new_tokens=100, temperature=0.0),
        SamplingParams(max_new_tokens=100, temperature=2.0, seed=3),
        SamplingParams(max_new_tokens=5, temperature=1.0, top_p=0.9, seed=4, logprobs=True),
    ]
    events = {}
    requests = [engine.submit(prompt, settings) for prompt, settings in zip(prompts, params, strict=True)]
    for _ in range(5):
        collect(engine, events)
    obeying = [engine.submit(prompts[0], settings, grammar=Counting()) for settings in guided]
    drain(engine, events)
    for request, prompt, settings in zip(requests, prompts, params, strict=True):
        check(tokens_of(events[request]), prompt, settings)
    for request, settings in zip(obeying, guided, strict=True):
        tokens = tokens_of(events[request])
        steps = np.diff([10, *tokens])
        assert steps.min() >= 1 and steps.max() <= 3
        reason = events[request][-1].finish_reason
        assert (tokens[-1] > 60) == (reason == "stop") and (len(tokens) == 5) == (reason == "length")
        check(tokens, prompts[0], settings, grammar=Counting)


class Late(Counting):
    """Say anything five times, then count."""

    def __init__(self):
        super().__init__()
        self.spoken = 0

    @property
    def free(self):
        return self.spoken < 5

    def accept(self, token):
        self.spoken += 1
        return self.spoken <= 5 or super().accept(token)


def test_a_grammar_may_be_free_for_a_while(engine, check, rng):
    prompt, params = rng.integers(3, 300, 30).tolist(), SamplingParams(max_new_tokens=9, temperature=0.0)
    params = dataclasses.replace(params, ignore_eos=True)
    tokens = single_run(engine, prompt, params, grammar=Late())
    check(tokens[:5], prompt, dataclasses.replace(params, max_new_tokens=5))
    assert len(tokens) == 9 and all(0 < step < 4 for step in np.diff([10, *tokens[5:]]))


def test_a_grammar_that_errs_ends_its_sequence_and_no_other(engine, check, rng):
    class Wrong(Counting):
        def accept(self, token):
            return False

    class Lost(Counting):
        def mask(self, out):
            if self.last > 20:
                raise UserError("the grammar is too complex")
            super().mask(out)

    prompt, params = rng.integers(3, 300, 30).tolist(), SamplingParams(max_new_tokens=30, temperature=0.0)
    params = dataclasses.replace(params, ignore_eos=True)
    wrong, lost = (engine.submit([5, 6, 7], params, grammar=grammar) for grammar in (Wrong(), Lost()))
    other = engine.submit(prompt, params)
    events = drain(engine)
    check(tokens_of(events[other]), prompt, params)
    for request, problem in ((wrong, "does not take a token"), (lost, "too complex")):
        *before, last = events[request]
        assert last.finish_reason == "error" and problem in last.problem
        assert all(event.problem is None for event in before)
    assert len(events[wrong]) == 1 and len(events[lost]) > 4
    assert engine.stats().used_pages == 0


def test_experts_are_told_to_those_who_ask(tiny_model, alone, check, rng):
    prompt, other = (rng.integers(3, 300, length).tolist() for length in (20, 70))
    params = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    asking, silent = alone.submit(prompt, params, include_routing=True), alone.submit(other, params)
    events = drain(alone)
    assert all(event.experts is None for event in events[silent])
    tokens = [*prompt, *tokens_of(events[asking])]
    check(tokens[20:], prompt, params)
    found = np.stack([event.experts for event in events[asking]], axis=1)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, chosen_experts(tiny_model, tokens)[:, 19:-1])


def chosen_experts(model, tokens):
    """Return the experts [L, T, k] that the bare model chooses."""
    padded = np.zeros(256, np.int32)
    padded[: len(tokens)] = tokens
    return np.stack(route_all(model, padded))[:, : len(tokens)]


@jax.jit
def route_all(model, tokens):
    out = model(tokens, jnp.arange(len(tokens)), attend_to_all)
    return [routed.experts for routed in out.routing]


def attend_to_all(q, k, v, cache):
    return packed_attention(q[None], k[None], v[None], jnp.zeros((1, len(q)), jnp.int32))[0], cache


def test_the_load_of_experts_is_that_of_the_tokens_that_ran(tiny_model, rng):
    """Prompts in chunks, alone and beside decoding sequences, decode steps, scores: nothing is missed or padded."""
    engine = Engine(tiny_model, single(), AMPLE, valid_vocab=300)
    assert engine.expert_load().shape == (2, 8) and not engine.expert_load().any()
    prompts = [rng.integers(3, 300, length).tolist() for length in (150, 3, 41, 20, 77)]
    expected = np.zeros((2, 8), np.int64)

    def expect(tokens):
        for counts, chosen in zip(expected, chosen_experts(tiny_model, tokens), strict=True):
            counts += np.bincount(chosen.ravel(), minlength=8)

    requests, events = {}, {}
    for length, prompt in enumerate(prompts, 5):
        params = SamplingParams(max_new_tokens=length, temperature=0.0, ignore_eos=True)
        requests[engine.submit(prompt, params)] = prompt
        for _ in range(3):
            collect(engine, events)
    drain(engine, events)
    for request, prompt in requests.items():
        expect([*prompt, *tokens_of(events[request])[:-1]])
    np.testing.assert_array_equal(engine.expert_load(), expected)
    engine.reset()
    for _ in engine.score(prompts[:3]):
        pass
    for prompt in prompts[:3]:
        expect(prompt)
    np.testing.assert_array_equal(engine.expert_load(), expected)
    # The words that count on the devices carry over.
    full = np.full_like(expected, 2**32 - 1)
    engine._step.load = single().put(np.array([[full, full * 0]], np.uint32))
    [_] = engine.score(prompts[1:2])
    counted = engine._step.read_load(engine._step.load) - (2**32 - 1)
    assert counted.sum(axis=1).tolist() == [6, 6] and counted.min() >= 0


def test_after_warming_up_nothing_is_compiled(tiny_model, rng):
    options = EngineOptions(cache_tokens=16 * 32, max_sequences=2, prefill_chunk=32, mixed_chunk=32, page_size=32)
    engine = Engine(tiny_model, single(), options, valid_vocab=300)
    params = [SamplingParams(max_new_tokens=20, temperature=0.0), SamplingParams(max_new_tokens=30, top_p=0.8, seed=1)]
    seen = []
    engine.warm_up(params, context=300, progress=lambda done, total: seen.append((done, total)))
    steps, total = len(engine.shapes(300)), seen[0][1]
    assert seen == [(done, total) for done in range(total + 1)]
    traces, sampled = engine._step.traces, engine._step._sample._cache_size()
    assert traces == steps and total == steps + sampled
    for _ in range(150):
        if rng.random() < 0.2:
            engine.submit(rng.integers(3, 300, rng.integers(1, 250)).tolist(), params[rng.integers(2)])
        engine.step()
    drain(engine)
    assert engine._step.traces == traces and engine._step._sample._cache_size() == sampled
