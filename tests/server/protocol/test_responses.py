import json

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ernie_jax.engine.sampling import SamplingParams
from ernie_jax.server.protocol import ApiError, ResponseAnswer, ResponsesRequest, Usage
from ernie_jax.text.answer import Content, Reasoning, ToolCallArguments, ToolCallStart
from ernie_jax.text.guidance import Function, TextConstraint, ToolConstraint

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": True, "description": "d"}


def test_the_least(parse):
    request = parse(ResponsesRequest, input="Hi")
    assert request.conversation.messages == [{"role": "user", "content": "Hi"}]
    assert request.conversation.text is None and request.conversation.tools.constraint is None
    assert request.generation.params(5, 25) == [SamplingParams(temperature=0.7, top_p=0.8, max_new_tokens=20)]


def test_everything(parse):
    request = parse(
        ResponsesRequest, model="m", input="Hi", instructions="S", max_output_tokens=9, temperature=0, stream=True,
        tools=[TOOL], tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=True, store=True, user="u",
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"}, include=["message.output_text.logprobs"], top_logprobs=2,
        metadata={"k": "v"}, truncation="disabled", previous_response_id=None, background=False, top_k=4,
        stream_options={"include_obfuscation": False},
    )  # fmt: skip
    conversation, generation = request.conversation, request.generation
    assert conversation.messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert conversation.text == TextConstraint("json_schema", SCHEMA, "text.format.schema", True)
    assert conversation.reasoning_budget == 1024
    assert conversation.tools.constraint == ToolConstraint((Function("f", SCHEMA, "tools[0]", True),), True, False)
    assert conversation.tools.prompt == (
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
    )
    assert generation.stream and generation.max_tokens == 9 and generation.length_field == "max_output_tokens"
    assert generation.sampling.logprobs and generation.sampling.top_logprobs == 2 and generation.sampling.top_k == 4
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}
    narrowed = parse(ResponsesRequest, input="Hi", tools=[TOOL], tool_choice=allowed).conversation.tools.constraint
    assert not narrowed.required and narrowed.parallel


def test_input_items(parse):
    items = [
        {"role": "developer", "content": "S"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "U"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "R"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "A", "annotations": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"a":1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Q"}]},
        {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
    ]  # fmt: skip

    def call(call_id, name, arguments="{}"):
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert parse(ResponsesRequest, input=items).conversation.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A", "reasoning_content": "R",
         "tool_calls": [call("c1", "f"), call("c2", "g", '{"a":1}')]},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "assistant", "content": None, "reasoning_content": "Q", "tool_calls": [call("c3", "f")]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields, param, code",
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_value"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type",
         "unsupported_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
        ({"input": [{"content": "x"}]}, "input[0].role", "missing_required_parameter"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "missing_required_parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"include": ["file_search_call.results"]}, "include", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.json_schema", "missing_required_parameter"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
        ({"max_tokens": 5}, "max_tokens", "unknown_parameter"),
    ],
)  # fmt: skip
def test_refused(refused, fields, param, code):
    message = refused(ResponsesRequest, param, code, **({"input": "Hi"} if fields else {}) | fields)
    assert param in message or param.removesuffix(".type") in message


EVENTS = [
    [Reasoning("R1"), Reasoning("R2")],
    [],
    [Content("C1")],
    [Content("C2"), ToolCallStart(0, "call_a", "f"), ToolCallArguments(0, '{"a"')],
    [ToolCallArguments(0, ":1}"), ToolCallStart(1, "call_b", "f"), ToolCallArguments(1, "{}")],
    [Content("C3")],
]
LOGPROB = {"token": "C1", "bytes": [67, 49], "logprob": -0.5, "top_logprobs": []}


@pytest.fixture
def answer(parse) -> ResponseAnswer:
    request = parse(ResponsesRequest, input="Hi", tools=[TOOL], instructions="S", reasoning={"effort": "low"})
    return ResponseAnswer(request, "resp_1", "ernie", 1700000000)


@pytest.mark.parametrize("reason, status", [("stop", "completed"), ("length", "incomplete")])
def test_stream(answer, reason, status):
    sent = answer.start()
    for index, events in enumerate(EVENTS):
        sent += json.loads(json.dumps(answer.add(events, [LOGPROB] if index == 2 else [])))
    sent += answer.finish(reason, Usage(9, 5, 4, 2))
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))
    item = ["response.output_item.added", "response.output_item.done"]
    call = [item[0], "response.function_call_arguments.delta", "response.function_call_arguments.done", item[1]]

    def text(kind, deltas):
        part = ["response.content_part.added", *deltas * [f"response.{kind}.delta"], f"response.{kind}.done"]
        return [item[0], *part, "response.content_part.done", item[1]]

    assert [event["type"] for event in sent] == [
        "response.created", "response.in_progress", *text("reasoning_text", 2), *text("output_text", 2),
        *call[:1], *call[1:2], *call[1:], *call, *text("output_text", 1), f"response.{status}",
    ]  # fmt: skip

    adapter, state = TypeAdapter(ResponseStreamEvent), ResponseStreamState(text_format=omit, input_tools=[])
    for event in sent:
        parsed = adapter.validate_python(json.loads(json.dumps(event)))
        assert parsed.type == event["type"]
        state.handle_event(parsed)  # the official client's own accumulator
    body = Response.model_validate(json.loads(json.dumps(answer.body)))
    assert sent[-1]["response"] == answer.body and body.status == status and body.output_text == "C1C2C3"
    reasoning, first, a, b, last = body.output
    assert reasoning.content[0].text == "R1R2" and first.content[0].logprobs[0].logprob == -0.5
    assert (a.call_id, a.name, a.arguments, a.status) == ("call_a", "f", '{"a":1}', "completed")
    assert (b.call_id, b.arguments) == ("call_b", "{}") and last.status == status
    assert len({part.id for part in body.output}) == 5
    assert body.usage.input_tokens_details.cached_tokens == 4 and body.usage.output_tokens_details.reasoning_tokens == 2
    assert body.instructions == "S" and body.tools[0].name == "f" and body.reasoning.effort == "low"
    assert (body.incomplete_details is None) == (reason == "stop")


def test_an_empty_answer(answer):
    assert [event["type"] for event in answer.finish("stop", Usage(1, 1))] == ["response.completed"]
    assert Response.model_validate(answer.body).output == []


def test_failure(answer):
    answer.start()
    answer.add([Content("C")])
    [event] = answer.fail(ApiError("the step failed", status=500))
    parsed = TypeAdapter(ResponseStreamEvent).validate_python(event)
    assert parsed.response.status == "failed" and parsed.response.error.code == "server_error"
