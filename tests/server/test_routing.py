"""The experts of answers and of all traffic are those that the bare model chooses."""

import time

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from ernie_jax.config import ModelConfig
from ernie_jax.llm import LLM
from ernie_jax.ops import packed_attention
from ernie_jax.server.metrics import Metrics
from tests.server.conftest import NAME, running

TEXT = "And the children of Israel"
ASKED = {"include_routing": True}
LAYERS = [1, 2, 3, 4, 5]


@jax.jit
def run_model(model, tokens):
    """Return the logits [T, V] of one sequence and the experts [L, T, k]."""

    def attend(q, k, v, cache):
        return packed_attention(q[None], k[None], v[None], jnp.zeros((1, len(tokens)), jnp.int32))[0], cache

    out = model(tokens, jnp.arange(len(tokens)), attend)
    return model.logits(out.hidden), jnp.stack([routed.experts for routed in out.routing])


def choices_of(llm, tokens):
    """Return the likeliest token after each of a sequence, and the experts [T, L, k] that it came out of."""
    padded = np.zeros(96, np.int32)
    padded[: len(tokens)] = tokens
    logits, experts = run_model(llm.model, padded)
    likeliest = np.asarray(logits)[:, : llm.tokenizer.vocab_size].argmax(-1)
    return likeliest[: len(tokens)].tolist(), np.asarray(experts).swapaxes(0, 1)[: len(tokens)]


def greedy(llm, prompt, length):
    """Return the tokens that the bare model goes on with, and their experts as JSON has them."""
    tokens = list(prompt)
    for _ in range(length):
        likeliest, experts = choices_of(llm, tokens)
        tokens.append(likeliest[-1])
    return tokens[len(prompt) :], experts[len(prompt) - 1 :].tolist()


def complete(client, prompt, body=ASKED, **fields):
    request = {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 8} | fields
    return client.completions.create(**request, extra_body=body)


def joined(chunks, index=0):
    """Return the experts of the tokens of all chunks of a stream."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    found = [choice.routing for choice in choices if "routing" in choice.model_extra]
    assert all(part["layers"] == LAYERS and part["num_experts"] == 8 and part["experts"] for part in found)
    return [token for part in found for token in part["experts"]]


def test_completions_tell_the_experts_that_the_model_chose(client, llm):
    prompt = llm.tokenizer.encode(TEXT)
    tokens, experts = greedy(llm, prompt, 8)
    answer = complete(client, [prompt, prompt], n=2)
    assert answer.usage.completion_tokens == 32 and len(answer.choices) == 4
    for choice in answer.choices:
        assert choice.text == llm.tokenizer.decode(tokens)
        assert choice.routing == {"layers": LAYERS, "num_experts": 8, "experts": experts}
    assert joined(list(complete(client, prompt, stream=True))) == experts
    assert client.models.retrieve(NAME).num_experts == 8
    plain = (
        complete(client, prompt, body=None).choices[0],
        *(chunk.choices[0] for chunk in complete(client, prompt, body=None, stream=True)),
    )
    assert not any("routing" in choice.model_extra for choice in plain)


def test_every_token_is_told_of_once_also_when_its_text_is_not(client, llm):
    """Ends of answers count as usage does: the stop token, and what a stop string cut off."""
    prompt = llm.tokenizer.encode(TEXT)
    tokens, experts = greedy(llm, prompt, 8)
    stop = llm.tokenizer.decode(tokens[2:5])[-3:]
    for fields, body in (({"stop": stop}, {}), ({}, {"stop_token_ids": tokens[3:4]})):
        chunks = list(complete(client, prompt, body=ASKED | body, stream=True, logprobs=1, **fields))
        answer = complete(client, prompt, body=ASKED | body, **fields)
        count = answer.usage.completion_tokens
        assert answer.choices[0].finish_reason == "stop" and 1 < count < 8
        assert joined(chunks) == answer.choices[0].routing["experts"] == experts[:count]
        text = llm.tokenizer.decode(tokens[:count])
        assert text.startswith(answer.choices[0].text) and text != answer.choices[0].text


def test_echo_without_an_answer(client):
    [choice] = complete(client, TEXT, echo=True, max_tokens=0).choices
    assert choice.text == TEXT and choice.routing == {"layers": LAYERS, "num_experts": 8, "experts": []}


def test_chats_and_responses(server, client, llm):
    messages = [{"role": "user", "content": TEXT}]
    request = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 8, "n": 2}
    answer = client.chat.completions.create(**request, extra_body=ASKED)
    prompt = httpx2.post(f"{server.url}/tokenize", json={"messages": messages}).json()["tokens"]
    _, experts = greedy(llm, prompt, answer.usage.completion_tokens // 2)
    assert [choice.routing["experts"] for choice in answer.choices] == [experts] * 2
    chunks = list(client.chat.completions.create(**request, stream=True, extra_body=ASKED))
    assert joined(chunks, 0) == joined(chunks, 1) == experts
    request = {"model": NAME, "input": TEXT, "temperature": 0, "max_output_tokens": 8}
    response = client.responses.create(**request, extra_body=ASKED)
    assert response.routing == {"layers": LAYERS, "num_experts": 8, "experts": experts}
    *others, last = client.responses.create(**request, stream=True, extra_body=ASKED)
    assert last.type in ("response.completed", "response.incomplete") and last.response.routing == response.routing
    assert not any("routing" in event.response.model_extra for event in others if hasattr(event, "response"))
    assert "routing" not in client.responses.create(**request).model_extra


def test_a_dense_model_has_none(checkpoint):
    config = ModelConfig("ernie4_5", 5120, 64, 96, 1, 4, 2, 16, max_position_embeddings=256)
    llm = LLM.random(config, "float32", tokenizer=checkpoint, cache_tokens=256, page_size=16)
    assert llm.engine.expert_load() is None
    with running(llm) as server:
        assert server.client.models.retrieve(NAME).num_experts == 0
        bodies = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
            "/v1/completions": {"prompt": "x"},
            "/v1/responses": {"input": "x"},
        }
        for path, body in bodies.items():
            response = httpx2.post(server.url + path, json={**body, **ASKED}, timeout=60)
            error = response.json()["error"]
            assert response.status_code == 400 and error["param"] == "include_routing"
            assert error["message"].count(".") == 1 and "this model has none" in error["message"]


def read_load(server):
    """Return the counts [L, E] that /metrics shows."""
    families = text_string_to_metric_families(httpx2.get(f"{server.url}/metrics", timeout=60).text)
    [samples] = [family.samples for family in families if family.name == "ernie_expert_tokens"]
    places = {(int(sample.labels["layer"]), int(sample.labels["expert"])): sample.value for sample in samples}
    return np.array([[places[layer, expert] for expert in range(8)] for layer in LAYERS])


def test_metrics_count_all_traffic(llm):
    """Prompts once, whatever is cached, answers but for the last token, of requests that ask for nothing as well."""
    with running(llm, metrics=Metrics()) as server:
        while llm.engine.has_work:  # what earlier tests have left in flight
            time.sleep(0.01)
        before = read_load(server)
        prompts = [llm.tokenizer.encode(text) for text in ("Now these are the names of", "Moreover David took " * 5)]
        expected = np.zeros_like(before)
        for prompt, length in zip(prompts, (9, 4), strict=True):
            body = {"ignore_eos": True}
            complete(server.client, prompt, body=body, max_tokens=length)
            tokens, _ = greedy(llm, prompt, length)
            _, experts = choices_of(llm, [*prompt, *tokens[:-1]])
            expected += [np.bincount(layer.ravel(), minlength=8) for layer in experts.swapaxes(0, 1)]
        np.testing.assert_array_equal(read_load(server) - before, expected)
        # All of the prompt's pages are known now, but for the last token's.
        cached = complete(server.client, prompts[1], max_tokens=1, body=None).usage.prompt_tokens_details.cached_tokens
        assert cached
        counted = read_load(server) - before - expected
        assert (counted.sum(axis=1) == 2 * (len(prompts[1]) - cached)).all()
