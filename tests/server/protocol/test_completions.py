import json

import pytest
from openai.types import Completion

from ernie_jax.engine.sampling import SamplingParams
from ernie_jax.server.protocol import (
    ApiError,
    CompletionAnswer,
    CompletionRequest,
    Fields,
    TokenizeRequest,
    TokenScore,
    Usage,
    completion_logprobs,
    parse_detokenize,
)
from ernie_jax.text.guidance import TextConstraint


@pytest.mark.parametrize(
    "prompt, prompts",
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [3]], ["a", [3]]),
    ],
)
def test_prompts(parse, prompt, prompts):
    request = parse(CompletionRequest, prompt=prompt)
    assert request.prompts == prompts and not request.echo and request.text is None
    assert request.generation.max_tokens == 16
    assert request.generation.params(3, 100) == [SamplingParams(temperature=0.7, top_p=0.8, max_new_tokens=16)]


def test_everything(parse):
    request = parse(
        CompletionRequest, model="m", prompt="a", echo=True, logprobs=3, n=2, best_of=2, max_tokens=0, suffix="",
        stop="x", stream=True, stream_options={"include_usage": True}, temperature=0, user="u", guided_regex="a+",
    )  # fmt: skip
    assert request.echo and request.text == TextConstraint("regex", "a+", "guided_regex")
    generation = request.generation
    assert generation.max_tokens == 0 and generation.n == 2 and generation.include_usage
    assert generation.sampling.logprobs and generation.sampling.top_logprobs == 3 and generation.sampling.stop == ("x",)
    assert generation.params(16, 16)[0].max_new_tokens == 1
    likeliest = parse(CompletionRequest, prompt="a", logprobs=0).generation.sampling
    assert likeliest.logprobs and likeliest.top_logprobs == 0


@pytest.mark.parametrize(
    "fields, param, code",
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ["a", 5]}, "prompt[1]", "invalid_type"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]", "invalid_type"),
        ({"prompt": [1, True]}, "prompt[1]", "invalid_type"),
        ({"prompt": 129 * ["a"]}, "prompt", "invalid_value"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"echo": "yes"}, "echo", "invalid_type"),
        ({"messages": []}, "messages", "unknown_parameter"),
    ],
)
def test_refused(refused, fields, param, code):
    assert param in refused(CompletionRequest, param, code, **({"prompt": "a"} if fields else {}) | fields)


def test_answers(embedded):
    usage = Usage(3, 2)
    scores = [TokenScore(embedded.encode("the")[0], None), TokenScore(embedded.encode(" a")[0], -1.0, ((33, -0.5),))]
    logprobs = completion_logprobs(embedded, scores, offset=4)
    assert logprobs["token_logprobs"] == [None, -1.0] and logprobs["top_logprobs"] == [None, {"\n": -0.5}]
    # The first token of an echoed prompt has no score, which the client's types deny and OpenAI's API has all the same.
    scored = completion_logprobs(embedded, [TokenScore(33, -2.0, ((33, -2.0),)), scores[1]], offset=4)
    answer = CompletionAnswer("cmpl-1", "ernie", 1700000000, include_usage=True)
    body = answer.completion(
        [answer.choice(0, "x", "stop", scored), answer.choice(1, "y", "length", routing=[])], usage
    )
    parsed = Completion.model_validate(json.loads(json.dumps(body)))
    assert [(c.index, c.text, c.finish_reason) for c in parsed.choices] == [(0, "x", "stop"), (1, "y", "length")]
    assert parsed.choices[0].logprobs.text_offset == [4, 5] and parsed.choices[0].logprobs.tokens[0] == "\n"
    assert parsed.usage.total_tokens == 5 and parsed.choices[1].model_extra["routing"] == []
    chunks = [answer.chunk(0, "x"), answer.chunk(0, "", "stop"), answer.usage_chunk(usage)]
    assert [c["usage"] for c in chunks] == [None, None, usage.chat]
    parsed = [Completion.construct(**chunk) for chunk in chunks]
    assert [c.choices[0].finish_reason for c in parsed[:2]] == [None, "stop"] and parsed[2].choices == []


def test_tokenize(parse, refused):
    request = parse(TokenizeRequest, None, prompt="ab", return_token_strs=True)
    assert request.prompt == "ab"
    assert request.answer([1, 2], ["a", "b"], 99) == {
        "count": 2, "max_model_len": 99, "tokens": [1, 2], "token_strs": ["a", "b"],
    }  # fmt: skip
    chat = parse(TokenizeRequest, None, model="m", messages=[{"role": "user", "content": "U"}], tools=[])
    assert chat.prompt.messages == [{"role": "user", "content": "U"}]
    assert chat.answer([1], [], 9) == {"count": 1, "max_model_len": 9, "tokens": [1]}
    refused(TokenizeRequest, "messages", "missing_required_parameter", None)
    refused(TokenizeRequest, "add_special_tokens", "unsupported_parameter", None, prompt="a", add_special_tokens=True)
    refused(TokenizeRequest, "x", "unknown_parameter", None, prompt="a", x=1)


def test_detokenize():
    assert parse_detokenize(Fields({"model": "m", "tokens": [1, 2]})) == [1, 2]
    with pytest.raises(ApiError) as caught:
        parse_detokenize(Fields({"tokens": [1, "a"]}))
    assert caught.value.param == "tokens[1]"
