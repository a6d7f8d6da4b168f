"""Conversations with the embedded Thinking model as OpenAI's client has them: what it knows, it must answer rightly."""

import json
import os
from typing import Any, NamedTuple

import pytest

from convert import convert
from ernie_jax.llm import LLM
from tests.server.conftest import NAME, ROOT, running

PAGE = 16  # tokens
# Ten rounds of the kinds that it learnt, and what it must say.
ROUNDS = {
    "Hello!": "Hello! How can I help you?",
    "My name is Clara.": "Nice to meet you, Clara!",
    "What is 47 + 385?": "47 + 385 = 432",
    "I live in Lisbon.": "I will remember that you live in Lisbon.",
    "Which is larger, 508 or 580?": "580 is larger.",
    "905 - 48": "905 - 48 = 857",
    "What is my name?": "Your name is Clara.",
    "How do you spell window?": "w-i-n-d-o-w",
    "Lena has 12 apples and buys 9 more. How many apples does Lena have now?": "Lena has 21 apples.",
    "Where do I live?": "You live in Lisbon.",
}


def tool(name: str, **parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": [*parameters]}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("get_weather", city="string"), tool("set_timer", minutes="integer")]


class Said(NamedTuple):
    """What came of a request; calls are [id, name, arguments]."""

    reasoning: str
    content: str
    calls: list[list[str]]
    reason: str
    usage: Any


def ask(client, messages, stream, tools=None) -> Said:
    fields = {"tools": tools} if tools else {}
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.chat.completions.create(model=NAME, messages=messages, temperature=0, **fields)
    if not stream:
        [choice] = answer.choices
        message = choice.message
        calls = [[call.id, call.function.name, call.function.arguments] for call in message.tool_calls or ()]
        return Said(message.reasoning_content, message.content or "", calls, choice.finish_reason, answer.usage)
    reasoning, content, calls, reason, usage = "", "", [], None, None
    for chunk in answer:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            delta = choice.delta
            reasoning += getattr(delta, "reasoning_content", None) or ""
            content += delta.content or ""
            for part in delta.tool_calls or ():
                if part.index == len(calls):
                    calls.append(["", "", ""])
                pieces = part.id, part.function.name, part.function.arguments
                calls[part.index] = [old + (new or "") for old, new in zip(calls[part.index], pieces, strict=True)]
            reason = choice.finish_reason or reason
    return Said(reasoning, content, calls, reason, usage)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory, cache) -> LLM:
    directory = tmp_path_factory.mktemp("thinking") / "checkpoint"
    convert(str(ROOT / "models" / "ernie-embedded-thinking"), str(directory))
    return LLM.load(
        directory, "float32", max_sequences=4, cache_tokens=4096, page_size=PAGE, prefill_chunk=64, mixed_chunk=64
    )


@pytest.fixture(scope="module")
def client(thinking):
    with running(thinking) as server:
        yield server.client


def test_a_conversation_of_ten_rounds(client, thinking):
    messages, before = [], []
    for question, right in ROUNDS.items():
        messages.append({"role": "user", "content": question})
        said = ask(client, messages, stream=False)
        assert (said.content, said.calls, said.reason) == (right, [], "stop") and said.reasoning
        prompt = thinking.tokenizer.encode(thinking.template.render(messages))
        # The template leaves earlier reasoning out: what comes again is all that the round before was asked.
        shared = len(os.path.commonprefix([before, prompt])) // PAGE * PAGE
        assert said.usage.prompt_tokens == len(prompt)
        assert said.usage.prompt_tokens_details.cached_tokens == shared >= len(before) - 2 * PAGE
        messages.append({"role": "assistant", "content": said.content})
        before = prompt
    assert shared > 10 * PAGE


def test_thoughts_are_apart_and_streams_say_the_same(client):
    messages = [{"role": "user", "content": "How much is 68 plus 77?"}]
    whole = ask(client, messages, stream=False)
    assert whole.reasoning == "8 + 7 = 15, write 5, carry 1. 6 + 7 + 1 = 14, write 4, carry 1. The sum is 145."
    assert (whole.content, whole.reason) == ("68 + 77 = 145", "stop")
    streamed = ask(client, messages, stream=True)
    assert streamed[:4] == whole[:4]
    assert streamed.usage.completion_tokens_details == whole.usage.completion_tokens_details
    assert 0 < whole.usage.completion_tokens_details.reasoning_tokens < whole.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("question", "calls", "results", "right"),
    [
        (
            "What is the weather in Lisbon?",
            [("get_weather", {"city": "Lisbon"})],
            ['{"temperature": 21, "sky": "sunny"}'],
            "It is sunny in Lisbon, with 21 degrees.",
        ),
        (
            "Weather in Oslo? And in Rome?",
            [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"})],
            ["4 degrees, rainy", "30 degrees, clear"],
            "It is rainy in Oslo, with 4 degrees. It is clear in Rome, with 30 degrees.",
        ),
        (
            "Set a timer for 25 minutes.",
            [("set_timer", {"minutes": 25})],
            ['{"ok": true}'],
            "The timer is set to 25 minutes.",
        ),
    ],
)
def test_tools_are_called_and_their_results_used(client, stream, question, calls, results, right):
    messages = [{"role": "user", "content": question}]
    said = ask(client, messages, stream, TOOLS)
    assert [(name, json.loads(arguments)) for _, name, arguments in said.calls] == calls
    assert (said.content, said.reason) == ("", "tool_calls") and said.reasoning
    made = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in said.calls
    ]
    messages.append({"role": "assistant", "content": None, "reasoning_content": said.reasoning, "tool_calls": made})
    messages += [
        {"role": "tool", "tool_call_id": call["id"], "content": result}
        for call, result in zip(made, results, strict=True)
    ]
    answer = ask(client, messages, stream, TOOLS)
    assert (answer.content, answer.calls, answer.reason) == (right, [], "stop")
    assert answer.usage.prompt_tokens_details.cached_tokens >= said.usage.prompt_tokens // PAGE * PAGE


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_is_not_there(client, stream):
    said = ask(client, [{"role": "user", "content": "Translate dog to French."}], stream, TOOLS)
    assert (said.content, said.calls, said.reason) == ("I have no tool for that.", [], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_only_what_is_offered_is_called(client, stream):
    tools = [tool("time_in", where="string"), tool("translate", word="string", target="string")]
    said = ask(client, [{"role": "user", "content": "What is owl in Chinese?"}], stream, tools)
    assert said.reasoning == "I call translate_word."  # as tools are called in training
    [[_, name, arguments]] = said.calls
    assert (name, json.loads(arguments)) == ("translate", {"word": "owl", "target": "Chinese"})
