"""The Python interface: text, ids and messages in; completions, streams, scores and logits out."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ernie_jax
from convert import convert
from ernie_jax import SamplingParams, UserError, checkpoint
from ernie_jax.llm import _check_weights_fit
from ernie_jax.sharding import make_layout, single

EMBEDDED = pathlib.Path(__file__).parents[1] / "models" / "ernie-embedded"
SIZE = {"cache_tokens": 4096, "max_sequences": 4}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("embedded") / "checkpoint"
    convert(str(EMBEDDED), str(directory))
    return directory


@pytest.fixture(scope="module")
def llm(directory) -> ernie_jax.LLM:
    return ernie_jax.load(directory, dtype="float32", **SIZE)


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory, tiny_model, tiny_config) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    config = json.dumps(dataclasses.asdict(tiny_config)).encode()
    checkpoint.save(directory, tiny_model, {"config.json": config}, "test")
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_directory) -> ernie_jax.LLM:
    return ernie_jax.load(tiny_directory, **SIZE)


def greedy(count, **fields) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": count, "temperature": 0, "ignore_eos": True} | fields)


def test_public_names():
    assert all(getattr(ernie_jax, name) is not None for name in ernie_jax.__all__)
    assert ernie_jax.load == ernie_jax.LLM.load
    with pytest.raises(AttributeError, match="nonsense"):
        ernie_jax.nonsense  # noqa: B018


def test_load_never_converts(tmp_path):
    before = sorted(EMBEDDED.iterdir())
    with pytest.raises(UserError, match=r"no manifest.json.*main.py convert"):
        ernie_jax.load(EMBEDDED)
    with pytest.raises(UserError, match="no such directory"):
        ernie_jax.load(tmp_path / "missing")
    assert sorted(EMBEDDED.iterdir()) == before


def test_logits_agree_with_generation(tiny, rng):
    """Prefill, cached decode and the bare forward pass give one answer, token by token."""
    prompts = [rng.integers(3, 320, length).tolist() for length in (1, 7, 150)]
    completions = tiny.generate(prompts, greedy(6, logprobs=True, top_logprobs=3))
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = tiny.logits([*prompt, *completion.token_ids[:-1]])[len(prompt) - 1 :]
        table = np.asarray(jax.nn.log_softmax(logits))
        assert completion.token_ids == logits.argmax(-1).tolist()
        np.testing.assert_allclose(completion.logprobs, table.max(-1), atol=2e-4)
        for row, top in zip(table, completion.top_logprobs, strict=True):
            np.testing.assert_allclose([value for _, value in top], np.sort(row)[::-1][:3], atol=2e-4)
            np.testing.assert_allclose(row[[token for token, _ in top]], [value for _, value in top], atol=2e-4)
        assert (completion.prompt_tokens, completion.finish_reason, completion.text) == (len(prompt), "length", None)


def test_the_bare_model_gives_the_same_logits(tiny):
    tokens = np.array([[5, 6, 7, 8]], np.int32)
    logits = jax.jit(lambda tokens: ernie_jax.forward(tiny.model, tokens))(tokens)
    np.testing.assert_allclose(logits[0], tiny.logits([5, 6, 7, 8]), atol=1e-4)


def test_routing_is_what_scoring_goes_by(llm):
    """Each token's experts are the likeliest by biased probability, whatever padding follows its text."""
    texts = [llm.encode(text) for text in ("And it came to pass, that the king said unto them", "春晓\n孟浩然\n")]
    before = llm.engine.expert_load()
    llm.score(texts)
    counted = llm.engine.expert_load() - before
    tokens = np.zeros((2, 32), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    found = jax.jit(ernie_jax.routing)(llm.model, tokens)
    for layer, routed, counts in zip(llm.config.moe_layers, found, counted, strict=True):
        assert routed.experts.shape == routed.weights.shape == (2, 32, 2) and routed.probabilities.shape == (2, 32, 8)
        assert routed.log_total.shape == (2, 32)
        biased = routed.probabilities + llm.model.layers[layer].mlp.router.correction_bias[...]
        np.testing.assert_array_equal(routed.experts, jax.lax.top_k(biased, 2)[1])
        np.testing.assert_allclose(routed.weights.sum(-1), 1, atol=1e-5)
        chosen = np.concatenate([row[: len(text)] for row, text in zip(routed.experts, texts, strict=True)])
        np.testing.assert_array_equal(np.bincount(chosen.ravel(), minlength=8), counts)


def test_scores_agree_with_logits(tiny, rng):
    texts = [rng.integers(3, 320, length).tolist() for length in (30, 1, 5)]
    for text, score in zip(texts, tiny.score(texts), strict=True):
        table = np.asarray(jax.nn.log_softmax(tiny.logits(text)))
        assert score.token_ids == text and score.logprobs[0] is None
        np.testing.assert_allclose(score.logprobs[1:], table[np.arange(len(text) - 1), text[1:]], atol=2e-4)


def test_more_prompts_than_slots_each_as_if_alone(tiny, rng):
    prompts = [rng.integers(3, 320, length).tolist() for length in (3, 200, 17, 1, 90, 40)]
    params = [greedy(count) for count in (5, 2, 9, 7, 3, 1)]
    together = tiny.generate(prompts, params)
    alone = [tiny.generate([prompt], setting)[0] for prompt, setting in zip(prompts, params, strict=True)]
    assert together == alone
    assert [len(completion.token_ids) for completion in together] == [5, 2, 9, 7, 3, 1]


def test_text_and_its_ids_are_the_same_prompt(llm):
    by_text, by_ids = llm.generate(["And it came", llm.tokenizer.encode("And it came")], greedy(8))
    assert by_text == by_ids
    assert by_text.text == llm.tokenizer.decode(by_text.token_ids)


def test_messages_are_rendered_and_one_leading_space_is_dropped(llm):
    messages = [{"role": "user", "content": "Who?"}]
    rendered = llm.template.render(messages)
    token = next(index for index in range(300, 400) if llm.tokenizer.piece_bytes(index)[:1] == b" ")
    params = greedy(2, logit_bias={token: 100})
    as_chat, as_object, as_text = llm.generate([messages, {"messages": messages}, rendered], params)
    assert as_chat.token_ids == as_text.token_ids == [token] * 2
    assert as_text.text.startswith(" ") and as_chat.text == as_text.text[1:] and " " in as_chat.text
    assert as_chat == as_object
    assert as_chat.prompt_tokens == as_text.prompt_tokens == len(llm.tokenizer.encode(rendered))


def test_stop_strings_across_tokens(llm):
    """Whatever short string of the text is the stop string, the text ends before its first occurrence."""
    prompt = "And it came to pass"
    (free,) = llm.generate([prompt], greedy(24))
    stops = [free.text[start : start + 4] for start in range(2, len(free.text) - 4, 3)]
    ends = {len(llm.tokenizer.decode(free.token_ids[:count])) for count in range(24)}
    assert any(start + 1 < end < start + 4 for start in map(free.text.find, stops) for end in ends)  # some are cut
    completions = llm.generate([prompt] * len(stops), [greedy(24, stop=(stop,)) for stop in stops])
    for stop, completion in zip(stops, completions, strict=True):
        assert completion.text == free.text[: free.text.find(stop)]
        assert completion.finish_reason == "stop"
        assert completion.token_ids == free.token_ids[: len(completion.token_ids)]
        assert stop in llm.tokenizer.decode(completion.token_ids)
        assert stop not in llm.tokenizer.decode(completion.token_ids[:-1])


def test_a_stop_string_that_only_begins_is_given_out(llm):
    (free,) = llm.generate(["And it came"], greedy(6))
    (held,) = llm.generate(["And it came"], greedy(6, stop=(free.text[-3:] + "\x00",)))
    assert held == free


def test_a_stop_id_counts_but_is_not_text(llm):
    end = llm.config.eos_token_id
    params = SamplingParams(max_new_tokens=5, temperature=0, logit_bias={end: 100})
    stopped, going_on = llm.generate(["And", "And"], [params, dataclasses.replace(params, ignore_eos=True)])
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("", [end], "stop")
    assert (going_on.token_ids, going_on.finish_reason) == ([end] * 5, "length")


def test_streams_concatenate_to_the_text(llm):
    """Also with hot sampling, where bytes of characters come one by one and out of order."""
    prompts = ["And it came", "李白\n", [{"role": "user", "content": "Who?"}], "\n"]
    params = SamplingParams(max_new_tokens=40, temperature=3.0, seed=5, ignore_eos=True, stop=("\n",))
    pieces, completions = [""] * 4, [None] * 4
    for chunk in llm.stream(prompts, params):
        assert completions[chunk.index] is None  # nothing comes after the end
        pieces[chunk.index] += chunk.text
        completions[chunk.index] = chunk.completion
    assert [completion.text for completion in completions] == pieces
    assert any(len(completion.token_ids) > 5 for completion in completions)
    assert completions == llm.generate(prompts, params)


def test_closing_a_stream_frees_everything(tiny):
    free = tiny.engine.free_tokens
    chunks = tiny.stream([[5, 6], [7]] * 4, [greedy(2), greedy(900)] * 4)
    first = next(chunks)
    assert first.completion and tiny.engine.has_work
    with pytest.raises(RuntimeError, match="a stream of this LLM is open"):
        tiny.generate([[5]], greedy(1))
    chunks.close()
    assert not tiny.engine.has_work and tiny.engine.free_tokens == free
    assert tiny.generate([[5, 6]], greedy(2)) == [first.completion]


def test_nothing_is_in_flight_when_generate_returns(llm):
    """Scoring, which needs an idle engine, follows at once; and a process may end."""
    llm.generate(["And it came to pass"], greedy(64, stop=("e",)))
    assert not llm.engine.has_work
    assert llm.score(["And"])[0].logprobs[0] is None


def test_a_process_that_ends_after_generate_ends_well(tiny_directory):
    program = (
        f"import ernie_jax; llm = ernie_jax.load({str(tiny_directory)!r}, cache_tokens=1024, max_sequences=2)\n"
        "params = ernie_jax.SamplingParams(max_new_tokens=50, temperature=0, stop_token_ids=list(range(320)))\n"
        "print(len(llm.generate([[5, 6]], params)[0].token_ids))"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([5, 5120], "token id 5120"),
        ([-1], "token id -1"),
        ([1.5], "a prompt must be"),
        (["And"], "a prompt must be"),
        (7, "a prompt must be"),
        ({"prompt": "x"}, "lacks messages"),
        ([{"role": "user"}], r"messages\[0\]"),
        ([5] * 4096, "context of 4096"),
    ],
)
def test_bad_prompts(llm, prompt, words):
    with pytest.raises(UserError, match=words):
        llm.generate(["And", prompt], greedy(1))
    assert not llm.engine.has_work


def test_a_text_in_place_of_a_list_is_a_mistake_of_the_program(llm):
    with pytest.raises(TypeError, match="pass \\[text\\]"):
        llm.generate("And")


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [
        ("And", {}, "no tokenizer"),
        ([{"role": "user", "content": "x"}], {}, "no tokenizer"),
        ([5], {"stop": "x"}, "stop"),
    ],
)
def test_text_needs_a_tokenizer(tiny, prompt, fields, words):
    with pytest.raises(UserError, match=words):
        tiny.generate([prompt], greedy(1, **fields))


def test_a_checkpoint_recommends_its_sampling(llm):
    recommended = json.loads((EMBEDDED / "generation_config.json").read_text())
    params = llm.sampling_params(max_new_tokens=3, top_k=None)
    assert params.max_new_tokens == 3
    for name in ("temperature", "top_p", "repetition_penalty"):
        assert getattr(params, name) == recommended.get(name, getattr(SamplingParams(), name))
    assert llm.sampling_params(temperature=0).temperature == 0
    assert params.temperature != SamplingParams().temperature


def test_dtype_and_sizes(tiny_directory):
    llm = ernie_jax.load(tiny_directory, dtype="bfloat16", cache_tokens=200, max_sequences=3)
    assert llm.engine.dtype == "bfloat16" and llm.engine.cache_tokens == 256
    assert "bfloat16" in llm.describe() and "256 tokens" in llm.describe() and "up to 3 sequences" in llm.describe()
    with pytest.raises(UserError, match="KV cache"):
        llm.generate([[5] * 250], greedy(10))
    with pytest.raises(UserError, match="dtype 'int8'"):
        ernie_jax.load(tiny_directory, dtype="int8")


def test_weights_that_exceed_the_device_are_refused():
    config = ernie_jax.ModelConfig.from_file(EMBEDDED.parents[1] / "configs" / "ernie-4.5-21b-a3b-thinking.json")
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 24e9, "bytes_in_use": 1e9}, device_kind="Toy")
    bfloat16 = jnp.dtype(jnp.bfloat16)
    sentence = r"the weights take 43\.7 GB a device in bfloat16 with sharding single, and Toy has 23\.0 GB free"
    with pytest.raises(UserError, match=sentence):
        _check_weights_fit(config, bfloat16, single(), [device])
    _check_weights_fit(config, bfloat16, make_layout(config, jax.devices()[:2]), [device] * 2)  # 21.9 GB each


def test_relative_paths_and_home(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    assert ernie_jax.load(directory.name, **SIZE).tokenizer
    monkeypatch.setenv("HOME", str(directory.parent))
    assert checkpoint.read_manifest(f"~/{directory.name}")["format"] == "ernie_jax"
