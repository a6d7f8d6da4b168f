"""An 8-bit KV cache: the engine computes what a forward pass does whose keys and values are rounded alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from ernie_jax.cli.models import embedded_model
from ernie_jax.engine import Engine, EngineOptions, SamplingParams
from ernie_jax.engine.aot import decode_shape, lower_step, mixed_shape, prefill_shape
from ernie_jax.engine.cache import bytes_per_token, parse_kv_dtype
from ernie_jax.llm import LLM
from ernie_jax.model import Ernie, initialize
from ernie_jax.ops import packed_attention
from ernie_jax.ops.pages import as_cached
from ernie_jax.sharding import make_layout, single

PAGE, NEW = 16, 24
SMALL = EngineOptions(14 * PAGE, max_sequences=4, prefill_chunk=64, mixed_chunk=16, page_size=PAGE, kv_dtype="int8")


@functools.partial(jax.jit, static_argnames="form")
def log_probabilities(model, tokens, form):
    """Return [T, V] after each token of a sequence [T], computed without a cache."""

    dtype = parse_kv_dtype(form, jnp.float32)

    def attend(q, k, v, cache):
        k, v = as_cached(k, dtype), as_cached(v, dtype)
        return packed_attention(q, k, v, jnp.zeros((1, len(tokens)), jnp.int32)), cache

    hidden = model(tokens[None], jnp.arange(len(tokens))[None], attend).hidden
    return jax.nn.log_softmax(model.logits(hidden)[0].astype(jnp.float32))


def on_text(model, tokens, form):
    padded = np.zeros(-(-len(tokens) // 256) * 256, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(log_probabilities(model, padded, form))[: len(tokens)]


def check(engine, model, prompts):
    """Run greedily, and hold each token's log-probability to the model's."""
    params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=True)
    requests, events = [engine.submit(prompt, params) for prompt in prompts], {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request, []).append(event)
    ours, theirs, best, exact = [], [], [], []
    for request, prompt in zip(requests, prompts, strict=True):
        tokens = [event.token for event in events[request]]
        assert len(tokens) == NEW
        expected = on_text(model, prompt + tokens, "int8")[len(prompt) - 1 : -1]
        ours += [event.logprob for event in events[request]]
        theirs += expected[np.arange(NEW), tokens].tolist()
        best += expected[:, :300].max(-1).tolist()
        exact += on_text(model, prompt + tokens, None)[len(prompt) - 1 : -1][np.arange(NEW), tokens].tolist()
    ours, theirs, best, exact = map(np.asarray, (ours, theirs, best, exact))
    # Sums in another order turn a rounding now and then, of which all tokens behind it notice a little; what rounding
    # itself does is much more.
    rounding = np.median(np.abs(ours - exact))
    assert np.median(np.abs(ours - theirs)) < rounding / 4 and rounding > 1e-4
    assert np.abs(ours - theirs).max() < 0.1 and (best - theirs).max() < 0.1


def prompts_of(rng, *lengths):
    common = rng.integers(3, 300, 40).tolist()
    return [common + rng.integers(3, 300, length).tolist() for length in lengths]


def test_prefixes_found_and_sequences_that_give_way(tiny_model, rng):
    engine = Engine(tiny_model, single(), SMALL, valid_vocab=300)
    check(engine, tiny_model, prompts_of(rng, 22, 20, 21, 23))
    counted = engine.stats()
    assert counted.preemptions > 0 and counted.cached_tokens > 0
    assert engine.free_tokens == engine.cache_tokens


def test_heads_and_pages_on_a_mesh(tiny_config, tiny_model, rng):
    layout = make_layout(tiny_config, jax.devices()[:4], "data:2,expert:2")
    model = Ernie(tiny_config, jnp.float32)
    initialize(model, layout, seed=3, scale=0.1)
    engine = Engine(model, layout, dataclasses.replace(SMALL, cache_tokens=2048), valid_vocab=300)
    check(engine, tiny_model, prompts_of(rng, 1, 20))


def test_the_step_writes_the_cache_in_place(tiny_config):
    """No copy of the cache in the compiled step, nor of its scales."""
    model = tiny_config, single()
    decode, prefill = decode_shape(*model, 1, 48, PAGE), prefill_shape(*model, 64, 64, PAGE)
    for step in (decode, prefill, mixed_shape(*model, 4, 64, 128, PAGE)):
        lowered = lower_step(*model, jnp.float32, step, 65, PAGE, kv_dtype=jnp.int8)
        compiled = lowered.compile()
        text = compiled.as_text()
        shapes = "s8[65,16,4,16]", "f32[65,4,16]"
        assert all(shape in text for shape in shapes)
        copies = [line.split("(")[0] for line in text.splitlines() if " copy(" in line]
        assert not [line for line in copies if any(shape in line for shape in shapes)]
        assert compiled.memory_analysis().alias_size_in_bytes >= 65 * PAGE * bytes_per_token(tiny_config, jnp.int8)


@pytest.fixture(scope="module", params=["ernie-embedded", "ernie-embedded-thinking"])
def written(request, tmp_path_factory):
    """A model of those that come with the project, and texts that it wrote."""
    directory = tmp_path_factory.mktemp("embedded")
    convert.convert(str(embedded_model().parent / request.param), str(directory / "model"))
    llm = LLM.load(directory / "model", "float32", cache_tokens=2048)
    prompts = ["And God said", "In the beginning", "春", "The LORD"]
    params = [llm.sampling_params(temperature=1.0, top_p=1.0, max_new_tokens=120, seed=i) for i in range(4)]
    completions = llm.generate(prompts, params)
    texts = [[*llm.encode(p), *c.token_ids] for p, c in zip(prompts, completions, strict=True)]
    return directory / "model", llm, texts


def test_quality_of_the_embedded_models(written):
    """The bounds are some times what docs/quantization.md tells."""
    directory, llm, texts = written
    exact = [on_text(llm.model, text, None) for text in texts]
    for form, mean, median, same in (("fp8", 4e-2, 8e-3, 0.9), ("int8", 5e-3, 5e-4, 0.97)):
        small = [on_text(llm.model, text, form) for text in texts]
        divergences = np.concatenate([(np.exp(a) * (a - b)).sum(-1) for a, b in zip(exact, small, strict=True)])
        agreed = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(exact, small, strict=True)])
        print(f"{form}: KL mean {divergences.mean():.2e} median {np.median(divergences):.2e}, same {agreed.mean():.3f}")
        assert divergences.mean() < mean and np.median(divergences) < median and agreed.mean() > same
    # The engine computes the same, of int8 as the last.
    scores = LLM.load(directory, "float32", cache_tokens=2048, kv_dtype="int8").score(texts)
    for text, logprobs, score in zip(texts, small, scores, strict=True):
        expected = logprobs[np.arange(len(text) - 1), text[1:]]
        assert np.median(np.abs(expected - score.logprobs[1:])) < 1e-3
