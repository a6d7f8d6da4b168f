"""All that is not chat: completions, tokens, models, and how requests are refused."""

import json

import httpx2
import numpy as np
import openai
import pytest

from tests.server.storm import PATIENCE

NAME = "ernie-embedded"
TEXT = "In the beginning God created"


def complete(client, prompt=TEXT, **fields):
    return client.completions.create(model=NAME, prompt=prompt, **{"temperature": 0, "max_tokens": 6, **fields})


def error_of(caught) -> dict:
    return json.loads(caught.value.response.content)["error"]


def test_completions_of_text_and_tokens(client, llm):
    whole = complete(client)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 6
    assert complete(client, llm.tokenizer.encode(TEXT)).choices[0].text == whole.choices[0].text
    streamed = complete(client, stream=True, stream_options={"include_usage": True})
    chunks = list(streamed)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 6 and not chunks[-1].choices


def test_many_prompts_and_choices(client):
    answer = complete(client, [TEXT, "And it came to pass"], n=2, temperature=1.0, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and 4 < answer.usage.completion_tokens <= 24
    assert answer.choices[0].text != answer.choices[1].text


@pytest.mark.parametrize("length", [0, 3])
def test_echo_and_logprobs(client, llm, length):
    answer = complete(client, echo=True, logprobs=2, max_tokens=length)
    [choice] = answer.choices
    found, tokens = choice.logprobs, llm.tokenizer.encode(TEXT)
    assert choice.text.startswith(TEXT) and "".join(found.tokens) == choice.text
    assert len(found.tokens) == len(tokens) + length and answer.usage.completion_tokens == length
    places = zip(found.text_offset, found.tokens, strict=True)
    assert all(choice.text[offset:].startswith(token) for offset, token in places)
    expected = llm.logits(tokens)
    expected = expected - expected.max(-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    picked = [float(row[token]) for row, token in zip(expected, tokens[1:], strict=False)]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1 : len(tokens)] == pytest.approx(picked, abs=1e-3)
    assert found.top_logprobs[0] is None and all(len(top) == 2 for top in found.top_logprobs[1:])
    if length:
        assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())
        streamed = list(complete(client, echo=True, logprobs=2, max_tokens=length, stream=True))
        assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
        offsets = [o for chunk in streamed if chunk.choices[0].logprobs for o in chunk.choices[0].logprobs.text_offset]
        assert offsets == found.text_offset


def test_guided_text(client):
    answer = complete(client, extra_body={"guided_regex": "[0-9]{3}-[0-9]{2}"}, max_tokens=20)
    first, _, last = answer.choices[0].text.partition("-")
    assert first.isdecimal() and last.isdecimal() and len(first) == 3 and answer.choices[0].finish_reason == "stop"


def test_models_tokens_and_state(server, client):
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    http = httpx2.Client(base_url=server.url, timeout=PATIENCE)
    card = http.get(f"/v1/models/{NAME}").json()
    assert card["max_model_len"] == 4096 and card["default_sampling"] == {"temperature": 0.7, "top_p": 0.8}
    found = http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) and "".join(found["token_strs"]) == TEXT
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": TEXT}
    assert http.post("/detokenize", json={"tokens": [10**6]}).json()["error"]["param"] == "tokens"
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": TEXT}]}).json()
    assert chat["count"] > found["count"] and chat["max_model_len"] == 4096
    assert http.get("/health").json() == {"status": "ok"} and http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json()["version"] and http.get("/metrics").text == "running 0\n"


@pytest.mark.parametrize(
    "fields, status, param, code",
    [
        ({"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ({"model": "another"}, 404, "model", "model_not_found"),
        ({"max_tokens": 5000}, 400, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
        ({"logit_bias": {"100000": 1}}, 400, "messages", "invalid_value"),
        ({"extra_body": {"colour": "red"}}, 400, "colour", "unknown_parameter"),
        ({"response_format": {"type": "regex", "regex": "("}}, 400, "response_format.regex", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 300_000}]}, 413, None, "request_too_large"),
    ],
)
def test_refusals(client, fields, status, param, code):
    request = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4} | fields
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**request, stream=stream)
        error = error_of(caught)
        assert (caught.value.status_code, error["param"], error["code"]) == (status, param, code), error
        assert error["message"] and error["type"] and "\n" not in error["message"]


def test_what_no_client_sends(server):
    http = httpx2.Client(base_url=server.url, timeout=PATIENCE)
    for method, path, content, status in [
        ("POST", "/v1/chat/completions", b"{nonsense", 400),
        ("POST", "/v1/chat/completions", b"[1, 2]", 400),
        ("POST", "/v1/completions", b"\xff\xfe", 400),
        ("POST", "/v1/completions", b"[" * 100_000, 400),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/embeddings", b"{}", 404),
    ]:
        response = http.request(method, path, content=content)
        assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}
    chunked = http.post("/v1/completions", content=(b"x" * 50_000 for _ in range(8)))
    assert chunked.status_code == 413


def test_request_ids_cors_and_the_log(server):
    http = httpx2.Client(base_url=server.url, timeout=PATIENCE)
    body = {"prompt": "Secret words", "max_tokens": 2}
    named = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1", "origin": "https://example.org"})
    assert named.headers["x-request-id"] == "mine-1"
    assert named.headers["access-control-allow-origin"] == "https://example.org"
    other = http.get("/v1/models", headers={"origin": "https://elsewhere.org", "x-request-id": "not one\tword"})
    assert other.headers["x-request-id"].startswith("req_") and "access-control-allow-origin" not in other.headers
    [(args, _)] = [line for line in server.log.lines if line[0][0] == "mine-1"]
    _, key, endpoint, status, seconds, usage = args
    assert (key, endpoint, status, usage.completion) == ("anonymous", "/v1/completions", 200, 2) and seconds > 0
    assert "Secret" not in str(server.log.lines)
    caller, endpoint, model, usage, status = server.ledger.entries["mine-1"]
    assert status == 200
    assert (caller, endpoint, model) == ("anonymous", "/v1/completions", NAME)
    assert usage.chat == named.json()["usage"]
    assert server.metrics.first_tokens and server.metrics.tokens
