import json

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ernie_jax.engine.sampling import SamplingParams
from ernie_jax.errors import UserError
from ernie_jax.server.protocol import AnswerMessage, ApiError, ChatAnswer, ChatRequest, Conversation, TokenScore, Usage
from ernie_jax.server.protocol.tools import Tools
from ernie_jax.text import ChatTemplate
from ernie_jax.text.answer import AnswerFormat, AnswerParser, Content, Reasoning, ToolCallArguments, ToolCallStart
from ernie_jax.text.guidance import Function, Guidance, TextConstraint, ToolConstraint

USER = {"role": "user", "content": "U"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WEATHER = {"name": "get_w", "description": "d 天", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now", "strict": True}}]
FUNCTIONS = (
    Function("get_w", SCHEMA, "tools[0].function", False),
    Function("now", None, "tools[1].function", True),
)


def test_the_least(parse):
    request = parse(ChatRequest, messages=[USER])
    assert request.model is None and request.conversation == Conversation([USER], Tools(given=([], "auto")))
    generation = request.generation
    assert generation.sampling == SamplingParams(temperature=0.7, top_p=0.8)
    assert (generation.n, generation.stream, generation.max_tokens, generation.include_usage) == (1, False, None, False)
    assert generation.params(10, 100) == [SamplingParams(temperature=0.7, top_p=0.8, max_new_tokens=90)]


def test_everything(parse):
    fields = {
        "model": "ernie", "messages": [USER], "temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"7": -100},
        "stop": ["a", "b"], "stop_token_ids": [9], "ignore_eos": True, "seed": -1, "n": 3, "logprobs": True,
        "top_logprobs": 2, "max_tokens": 5, "max_completion_tokens": 7, "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False}, "include_routing": True,
        "priority": -2, "timeout": 1.5, "reasoning_effort": "low", "chat_template_kwargs": {"system_settings": "S"},
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k",
        "safety_identifier": "x", "tools": [], "parallel_tool_calls": True, "modalities": ["text"], "verbosity": "low",
        "function_call": None, "functions": None, "audio": None, "response_format": {"type": "text"}, "min_tokens": 0,
        "skip_special_tokens": True,
    }  # fmt: skip
    request = parse(ChatRequest, **fields)
    expected = SamplingParams(
        temperature=0, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.1,
        logit_bias={7: -100}, stop=("a", "b"), stop_token_ids=(9,), ignore_eos=True, seed=2**64 - 1, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    generation = request.generation
    assert request.model == "ernie" and generation.sampling == expected
    assert (generation.n, generation.stream, generation.include_usage, generation.include_routing) == (
        3,
        True,
        True,
        True,
    )
    assert (generation.priority, generation.timeout) == (-2, 1.5)
    assert request.conversation.reasoning_budget == 1024 and request.conversation.variables == {"system_settings": "S"}
    first, second, third = generation.params(10, 17)
    assert first.max_new_tokens == 7 and (first.seed, second.seed, third.seed) == (2**64 - 1, 0, 1)
    with pytest.raises(ApiError, match=r"17 tokens.*requested 18 tokens \(11 in the prompt, 7 in") as caught:
        generation.params(11, 17)
    assert (caught.value.param, caught.value.code) == ("max_completion_tokens", "context_length_exceeded")


@pytest.mark.parametrize(
    "fields, param, code",
    [
        ({}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "missing_required_parameter"),
        ({"messages": [{"role": "owner", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text",
         "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
         "messages[0].content[0].type", "unsupported_value"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
         "messages[0].tool_calls", "invalid_value"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
         "messages[0].tool_calls[0].function.name", "missing_required_parameter"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call",
         "unsupported_parameter"),
        ({"temperature": 1000}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": -1}, "top_p", "invalid_value"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"seed": "x"}, "seed", "invalid_type"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "invalid_type"),
        ({"logprobs": 3}, "logprobs", "invalid_type"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
        ({"timeout": 0}, "timeout", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"functions": [WEATHER]}, "functions", "unsupported_parameter"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "invalid_value"),
        ({"min_tokens": 5}, "min_tokens", "unsupported_parameter"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
        ({"reasoning_max_tokens": -1}, "reasoning_max_tokens", "invalid_value"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"function": WEATHER}]}, "tools[0].type", "missing_required_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": "x"}}]},
         "tools[0].function.parameters", "invalid_type"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": "all"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice",
         "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "missing_required_parameter"),
        ({"response_format": "json"}, "response_format", "invalid_type"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
         "response_format.json_schema.schema", "invalid_type"),
        ({"response_format": {"type": "regex"}}, "response_format.regex", "missing_required_parameter"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "invalid_value"),
        ({"guided_choice": ["a", 5]}, "guided_choice[1]", "invalid_type"),
        ({"guided_json": "{"}, "guided_json", "invalid_value"),
    ],
)  # fmt: skip
def test_refused(refused, fields, param, code):
    message = refused(ChatRequest, param, code, **({"messages": [USER]} if fields else {}) | fields)
    assert param in message or param.removesuffix(".type") in message


def test_messages(parse):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None,
              "function_call": None, "tool_calls": [call], "reasoning_content": "R"}  # fmt: skip
    messages = [
        {"role": "developer", "content": "S", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        answer,
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "t"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "reasoning": "Q"},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "assistant", "tool_calls": [{"id": "c2", "function": {"name": "g", "arguments": ""}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"x": 1}}}]},
    ]
    assert parse(ChatRequest, messages=messages).conversation.messages == [
        {"role": "system", "content": "S", "name": "boss"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "content": "t", "tool_call_id": "c1"},
        {"role": "assistant", "content": "no", "reasoning_content": "Q"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": None, "type": "function", "function": {"name": "g", "arguments": {"x": 1}}}]},
    ]  # fmt: skip


def test_tools(parse):
    shown = (TOOLS[0], {"type": "function", "function": {"name": "now"}})

    def tools(**fields) -> Tools:
        return parse(ChatRequest, messages=[USER], tools=TOOLS, **fields).conversation.tools

    assert tools().prompt == shown and tools().constraint == ToolConstraint(FUNCTIONS, False, True)
    assert tools(tool_choice="auto", parallel_tool_calls=False).constraint == ToolConstraint(FUNCTIONS, False, False)
    assert tools(tool_choice="required").constraint == ToolConstraint(FUNCTIONS, True, True)
    none = tools(tool_choice="none")
    assert none.prompt == () and none.constraint is None
    named = tools(tool_choice={"type": "function", "function": {"name": "now"}})
    assert named.prompt == shown and named.constraint == ToolConstraint(FUNCTIONS[1:], True, False)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_w"}}]}
    narrowed = tools(tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert narrowed.constraint == ToolConstraint(FUNCTIONS[:1], True, True)
    assert parse(ChatRequest, messages=[USER], tool_choice="none").conversation.tools.constraint is None


def test_constraints(parse):
    def text(**fields) -> TextConstraint | None:
        return parse(ChatRequest, messages=[USER], **fields).conversation.text

    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"}}
    path = "response_format.json_schema.schema"
    assert text(response_format=schema) == TextConstraint("json_schema", SCHEMA, path, True)
    assert text(response_format={"type": "json_object"}) == TextConstraint("json_object", None, "response_format")
    assert text(response_format={"type": "text"}) is None and text(response_format=None) is None
    assert text(response_format={"type": "regex", "regex": "a"}) == TextConstraint(
        "regex", "a", "response_format.regex"
    )
    choice = TextConstraint("choice", ("a", "b"), "response_format.choice")
    assert text(response_format={"type": "choice", "choice": ["a", "b"]}) == choice
    assert text(guided_choice=["a"]) == TextConstraint("choice", ("a",), "guided_choice")
    assert text(guided_json=json.dumps(SCHEMA)) == TextConstraint("json_schema", SCHEMA, "guided_json")
    assert text(structured_outputs={"grammar": "g"}) == TextConstraint("grammar", "g", "structured_outputs.grammar")


def test_reasoning_budget(parse):
    def budget(**fields) -> int | None:
        return parse(ChatRequest, messages=[USER], **fields).conversation.reasoning_budget

    assert budget() is None and budget(reasoning_effort="high") is None and budget(reasoning_effort="none") == 0
    assert budget(reasoning_effort="low", reasoning_max_tokens=7) == 7
    assert budget(enable_thinking=False) == 0 and budget(enable_thinking=True) is None
    assert budget(chat_template_kwargs={"enable_thinking": False}) == 0


def test_from_request_to_grammar(parse, embedded):
    base, thinking = ChatTemplate.of_family("base"), ChatTemplate.of_family("thinking")
    guidance = Guidance(embedded, 5120, embedded.stop_ids())
    request = parse(ChatRequest, messages=[USER], tools=TOOLS, stream=True)
    prompt = request.conversation.render(thinking)
    assert '"name": "get_w"' in prompt and "strict" not in prompt
    form = request.conversation.format(thinking, prompt, stream=True)
    assert form == AnswerFormat(thinking=True, response_tags=True, tool_calls=True)
    assert request.conversation.grammar(guidance, form).free
    with pytest.raises(UserError, match="knows no tools"):
        request.conversation.render(base)

    plain = parse(ChatRequest, messages=[USER]).conversation
    form = plain.format(base, plain.render(base), stream=False)
    assert form == AnswerFormat(whole_calls=True) and plain.grammar(guidance, form) is None
    unwanted = parse(ChatRequest, messages=[USER], tools=TOOLS, tool_choice="none").conversation
    assert "get_w" not in unwanted.render(thinking)
    assert not unwanted.format(thinking, unwanted.render(thinking), stream=False).tool_calls
    named = {"type": "function", "function": {"name": "now"}}
    named = parse(ChatRequest, messages=[USER], tools=TOOLS, tool_choice=named).conversation
    assert not named.format(thinking, named.render(thinking), stream=False).parallel

    broken = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "objekt"}}}
    broken = parse(ChatRequest, messages=[USER], response_format=broken).conversation
    with pytest.raises(UserError) as caught:
        broken.grammar(guidance, AnswerFormat())
    assert ApiError.of(caught.value).param == "response_format.json_schema.schema"


ANSWER = ChatAnswer("chatcmpl-1", "ernie", 1700000000)
USAGE = Usage(prompt=9, completion=5, cached=4, reasoning=2)
EVENTS = [
    Reasoning("R"),
    Content("C"),
    ToolCallStart(0, "call_a", "f"),
    ToolCallArguments(0, '{"a"'),
    ToolCallArguments(0, ":1}"),
    ToolCallStart(1, "call_b", "g"),
    ToolCallArguments(1, "{}"),
]


def test_completion(embedded):
    message, plain = AnswerMessage(), AnswerMessage()
    message.add(EVENTS)
    token = embedded.token_id("<0xE5>")
    score = TokenScore(token, -0.5, ((token, -0.5), (embedded.encode("the")[0], -1.5)))
    body = ANSWER.completion(
        [
            ANSWER.choice(0, message, "stop", routing=[[1, 2]]),
            ANSWER.choice(1, plain, "length", [score.chat(embedded)]),
        ],
        USAGE,
    )
    parsed = ChatCompletion.model_validate(json.loads(json.dumps(body)))
    first, second = parsed.choices
    assert first.finish_reason == "tool_calls" and first.message.content == "C"
    assert first.message.model_extra["reasoning_content"] == "R" and first.model_extra["routing"] == [[1, 2]]
    assert [(c.id, c.function.name, c.function.arguments) for c in first.message.tool_calls] == [
        ("call_a", "f", '{"a":1}'),
        ("call_b", "g", "{}"),
    ]
    assert second.finish_reason == "length" and second.message.content == "" and second.message.tool_calls is None
    [scored] = second.logprobs.content
    assert (scored.token, scored.bytes, scored.logprob, len(scored.top_logprobs)) == ("\ufffd", [0xE5], -0.5, 2)
    usage = parsed.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 5, 14)
    assert usage.prompt_tokens_details.cached_tokens == 4 and usage.completion_tokens_details.reasoning_tokens == 2
    calls = AnswerMessage()
    calls.add(EVENTS[2:])
    assert ANSWER.choice(0, calls, "stop")["message"]["content"] is None


def test_chunks():
    answer = ChatAnswer("chatcmpl-1", "ernie", 1700000000, include_usage=True)
    chunks = [answer.first_chunk(0), *(answer.chunk(0, [event]) for event in EVENTS), answer.last_chunk(0, "stop", 2)]
    assert answer.chunk(0, []) is None
    parsed = [
        ChatCompletionChunk.model_validate(json.loads(json.dumps(c))) for c in [*chunks, answer.usage_chunk(USAGE)]
    ]
    assert all(c["usage"] is None for c in chunks) and all(c.id == "chatcmpl-1" for c in parsed)
    assert (
        parsed[0].choices[0].delta.role == "assistant"
        and parsed[-1].choices == []
        and parsed[-1].usage.total_tokens == 14
    )
    assert [c.choices[0].finish_reason for c in parsed[:-1]] == [None] * 8 + ["tool_calls"]
    deltas = [c.choices[0].delta for c in parsed[1:-2]]
    assert deltas[0].model_extra["reasoning_content"] == "R" and deltas[1].content == "C"
    calls = [delta.tool_calls[0] for delta in deltas[2:]]
    assert [(c.index, c.id, c.function.name, c.function.arguments) for c in calls] == [
        (0, "call_a", "f", ""), (0, None, None, '{"a"'), (0, None, None, ":1}"), (1, "call_b", "g", ""),
        (1, None, None, "{}"),
    ]  # fmt: skip
    together = answer.chunk(3, EVENTS, [], [[0]])["choices"][0]
    assert together["index"] == 3 and together["routing"] == [[0]] and together["logprobs"]["content"] == []
    assert [c["function"]["arguments"] for c in together["delta"]["tool_calls"]] == ['{"a":1}', "{}"]
    assert "usage" not in ANSWER.first_chunk(0)


def test_the_openai_client_gathers_the_stream():
    """The official client's own accumulator makes of our chunks what the whole answer is."""
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    text = "R\n</think>\n\n<response>\nC\n</response>\n\n\n" + call
    form = AnswerFormat(thinking=True, response_tags=True, tool_calls=True)
    parser, message, state = AnswerParser(form), AnswerMessage(), ChatCompletionStreamState()
    chunks = [ANSWER.first_chunk(0)]
    for events in [*map(parser.feed, text), parser.finish(False)]:
        message.add(events)
        if chunk := ANSWER.chunk(0, events):
            chunks.append(chunk)
    for chunk in [*chunks, ANSWER.last_chunk(0, "stop", parser.calls), ANSWER.usage_chunk(USAGE)]:
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    gathered = state.get_final_completion()
    choice = gathered.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == message.content == "C"
    assert choice.message.tool_calls[0].function.arguments == '{"a": 1}' and gathered.usage.total_tokens == 14
