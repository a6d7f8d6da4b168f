"""Chat through OpenAI's client: what it says, how it ends, and what it costs."""

import asyncio
import json

import pytest

NAME = "ernie-embedded"
HELLO = [{"role": "user", "content": "And it came to pass"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "unit": {"enum": ["m", "km"]}},
                "required": ["a", "unit"],
                "additionalProperties": False,
            },
        },
    }
]


def ask(client, messages=HELLO, **fields):
    fields = {"temperature": 0, "max_tokens": 8} | fields
    return client.chat.completions.create(model=NAME, messages=messages, **fields)


def joined(stream):
    """Return the text, the reasons and the usage of a stream's choices."""
    texts, reasons, usage = {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


def test_whole_and_streamed_answers_agree(client):
    whole = ask(client)
    [choice] = whole.choices
    assert choice.finish_reason == "length" and choice.message.content and choice.message.role == "assistant"
    assert (whole.object, whole.model, whole.id[:9]) == ("chat.completion", NAME, "chatcmpl-")
    assert whole.usage.completion_tokens == 8 and whole.usage.total_tokens == whole.usage.prompt_tokens + 8
    texts, reasons, usage = joined(ask(client, stream=True, stream_options={"include_usage": True}))
    assert texts == {0: choice.message.content} and reasons == {0: "length"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 8)


def test_it_says_what_the_model_says_alone(client, llm, server):
    prompt = llm.template.render(HELLO)
    params = llm.sampling_params(temperature=0.0, max_new_tokens=8)

    def alone(engine):
        request = engine.submit(llm.tokenizer.encode(prompt), params)
        tokens = []
        while engine.has_work:
            tokens += [event.token for event in engine.step() if event.request == request]
        return tokens

    async def call():
        return await server.runner.call(alone)

    tokens = asyncio.run_coroutine_threadsafe(call(), server.loop).result()
    assert ask(client).choices[0].message.content == llm.tokenizer.decode(tokens).removeprefix(" ")


def test_seed_n_and_streams_of_several_choices(client):
    settings = {"n": 3, "temperature": 1.0, "seed": 7}
    first, again = ask(client, **settings), ask(client, **settings)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2] and first.usage.completion_tokens == 24
    assert joined(ask(client, **settings, stream=True))[0] == dict(enumerate(texts))


def test_stop_strings_end_the_text_before_them(client):
    text = ask(client, max_tokens=16).choices[0].message.content
    stop = text[5:8]
    answer = ask(client, max_tokens=16, stop=[stop, "never said"], logprobs=True)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 16
    streamed = joined(ask(client, max_tokens=16, stop=stop, stream=True))
    assert streamed[:2] == ({0: text[: text.index(stop)]}, {0: "stop"})


def test_logprobs_are_those_of_the_content(client):
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    scores = choice.logprobs.content
    assert len(scores) == 8 and all(len(score.top_logprobs) == 3 for score in scores)
    assert b"".join(bytes(score.bytes) for score in scores).decode().removeprefix(" ") == choice.message.content
    assert all(score.logprob == score.top_logprobs[0].logprob <= 0 for score in scores)  # greedy
    streamed = [
        score.logprob
        for chunk in ask(client, logprobs=True, stream=True)
        for score in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert streamed == pytest.approx([score.logprob for score in scores], abs=1e-5)


def test_logit_bias_and_penalties(client, llm):
    token = llm.tokenizer.encode(" Lord")[0]
    biased = ask(client, logit_bias={str(token): 100}, max_tokens=4).choices[0].message.content
    assert biased == (llm.tokenizer.decode([token]) * 4).removeprefix(" ")
    punished = ask(client, logit_bias={str(token): 30}, presence_penalty=2, frequency_penalty=2, max_tokens=40)
    assert punished.choices[0].message.content != biased


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client, stream):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "maximum": 120, "minimum": 0},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = ask(client, response_format=form, temperature=1.0, seed=seed, max_tokens=200, stream=stream)
        if stream:
            texts, reasons, _ = joined(answer)
            text, reason = texts[0], reasons[0]
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        value = json.loads(text)
        assert reason == "stop" and set(value) == {"name", "age"} and 0 <= value["age"] <= 120


def test_forced_tool_call(client):
    choice = {"type": "function", "function": {"name": "add"}}
    answer = ask(client, tools=TOOLS, tool_choice=choice, temperature=1.0, seed=1, max_tokens=120).choices[0]
    [call] = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "add" and arguments["unit"] in ("m", "km") and 0 <= arguments["a"] <= 99
    assert answer.finish_reason == "tool_calls" and answer.message.content is None

    name, text, reason = "", "", None
    for chunk in ask(client, tools=TOOLS, tool_choice=choice, temperature=1.0, seed=1, max_tokens=120, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            name += part.function.name or ""
            text += part.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (name, json.loads(text), reason) == ("add", arguments, "tool_calls")


def test_a_conversation_reuses_its_prefix(client):
    messages, cached = [{"role": "system", "content": "Speak as the old books do, at length and in order."}], []
    for turn in range(10):
        messages.append({"role": "user", "content": f"Tell me of generation {turn}, and of those before."})
        answer = ask(client, messages, max_tokens=12)
        usage = answer.usage
        cached.append((usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens))
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    for (_, before), (found, _) in zip(cached, cached[1:], strict=False):
        assert found >= before - 16  # all full pages of the turn before


def test_a_chat_of_responses(client):
    whole = client.responses.create(model=NAME, input="And God said", temperature=0, max_output_tokens=16)
    assert whole.status == "incomplete" and whole.output_text and whole.usage.output_tokens == 16
    events = list(
        client.responses.create(model=NAME, input="And God said", temperature=0, max_output_tokens=16, stream=True)
    )
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert events[-1].response.usage.output_tokens == 16
