import json

import pytest

from ernie_jax.errors import UserError
from ernie_jax.text import ChatTemplate, Tokenizer

SYSTEM = {"role": "system", "content": "SYS"}
U1, U2 = {"role": "user", "content": "U1"}, {"role": "user", "content": "U2"}
A1 = {"role": "assistant", "content": "A1"}

# What Thinking's conversations share.
NO_SYSTEM = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
USER_1 = "<|im_start|>user\nU1<|im_end|>\n\n"
USER_2 = "<|im_start|>user\nU2<|im_end|>\n\n"
ANSWER_1 = "<|im_start|>assistant\n<response>\nA1\n</response>\n<|im_end|>\n\n"
OPEN = "<|im_start|>assistant\n<think>\n"


@pytest.fixture
def base() -> ChatTemplate:
    return ChatTemplate.of_family("base")


@pytest.fixture
def thinking() -> ChatTemplate:
    return ChatTemplate.of_family("thinking")


def write_template(directory, template) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def test_base(base):
    text = "<|begin_of_sentence|>SYS\nUser: U1\nAssistant: A1<|end_of_sentence|>User: U2\n"
    assert base.render([SYSTEM, U1, A1, U2]) == text + "Assistant: "
    assert base.render([SYSTEM, U1, A1, U2], add_generation_prompt=False) == text
    [template] = base._templates.values()  # rendered elsewhere, where nobody says whether an answer is wanted
    assert template.render(messages=[SYSTEM, U1, A1, U2]) == text + "Assistant: "


def test_base_takes_the_tokenizers_special_tokens():
    template = ChatTemplate.of_family("base", {"cls_token": "<cls>", "sep_token": "<sep>", "bos_token": "<s>"})
    assert template.render([U1, A1, U2]) == "<cls>User: U1\nAssistant: A1<sep>User: U2\nAssistant: "


def test_thinking_with_system(thinking):
    assert thinking.render([SYSTEM, U1, A1, U2]) == (
        "<|im_start|>system\n<system_setting>\nSYS\n</system_setting>\n\n"
        "<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n" + USER_1 + ANSWER_1 + USER_2 + OPEN
    )


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>R</think>A1"},
        {"content": "<think>\nR\n</think>\n\nA1"},
        {"content": "R\n</think>\nA1"},
        {"content": "A1", "thoughts": "R"},
        {"content": "A1", "thoughts": "\nR\n\n"},
        {"content": "A1", "reasoning_content": "R"},
    ],
)
def test_thinking_forgets_reasoning_before_the_latest_question(thinking, answer):
    answer = {"role": "assistant", **answer}
    assert thinking.render([U1, answer, U2]) == NO_SYSTEM + USER_1 + ANSWER_1 + USER_2 + OPEN
    # Behind the latest question it stays, and a fresh turn is opened even after an answer.
    kept = "<|im_start|>assistant\n<think>\nR\n</think>\n<response>\nA1\n</response>\n<|im_end|>\n\n"
    assert thinking.render([U1, answer]) == NO_SYSTEM + USER_1 + kept + OPEN
    assert thinking.render([U1, answer], add_generation_prompt=False) == NO_SYSTEM + USER_1 + kept + OPEN


def test_thinking_last_answer_without_reasoning(thinking):
    kept = "<|im_start|>assistant\n<think>\n\n</think>\n<response>\nA1\n</response>\n<|im_end|>\n\n"
    assert thinking.render([U1, A1]) == NO_SYSTEM + USER_1 + kept + OPEN
    assert thinking.render([U1, A1, A1]) == NO_SYSTEM + USER_1 + ANSWER_1 + kept + OPEN


def test_thinking_without_any_question(thinking):
    wrapped = {"role": "user", "content": "<tool_output>1</tool_output>"}
    answer = A1 | {"thoughts": "R"}
    wrapped_turn = "<|im_start|>user\n<tool_output>1</tool_output><|im_end|>\n\n"
    assert thinking.render([wrapped, answer]) == NO_SYSTEM + wrapped_turn + ANSWER_1 + OPEN


def test_thinking_tool_output_in_a_user_message_is_no_question(thinking):
    answer = A1 | {"thoughts": "R"}
    kept = "<|im_start|>assistant\n<think>\nR\n</think>\n<response>\nA1\n</response>\n<|im_end|>\n\n"
    for content, turn in (("<tool_output>1</tool_output>", kept), ("<tool_output>1</tool_output>?", ANSWER_1)):
        text = thinking.render([U1, answer, {"role": "user", "content": content}])
        assert text == NO_SYSTEM + USER_1 + turn + f"<|im_start|>user\n{content}<|im_end|>\n\n" + OPEN


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_w",
            "description": "d 天",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "g2", "parameters": {}}},
]


@pytest.mark.parametrize("tools", [TOOLS, [tool["function"] for tool in TOOLS]])
def test_thinking_tools(thinking, tools):
    assert thinking.render([U1], tools) == (
        "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting>\n\n<tool_list>\n"
        '[{"type": "function", "function": {"name": "get_w", "description": "d 天", "parameters": {"type": "object", '
        '"properties": {"city": {"type": "string"}}, "required": ["city"]}}},'
        '{"type": "function", "function": {"name": "g2", "parameters": {}}}]\n</tool_list><|im_end|>\n\n'
        + USER_1
        + OPEN
    )


def tool_loop(**answer) -> list[dict]:
    """Return a question, an answer that calls two tools, and what they returned."""
    calls = [
        {"id": "1", "type": "function", "function": {"name": "get_w", "arguments": '{"city": "北京"}'}},
        {"name": "g2", "arguments": {}},
    ]
    results = [{"role": "tool", "content": content, "tool_call_id": "1"} for content in ("sunny", '{"t": 1}')]
    return [U1, {"role": "assistant", "tool_calls": calls, **answer}, *results]


CALLS = (
    '\n<tool_call>\n{"name": "get_w", "arguments": {"city": "北京"}}\n</tool_call>\n'
    '\n\n<tool_call>\n{"name": "g2", "arguments": {}}\n</tool_call>\n<|im_end|>\n\n'
    '<|im_start|>tool\n<tool_output>"sunny"</tool_output>\n<tool_output>"{\\"t\\": 1}"</tool_output><|im_end|>\n\n'
)


def test_thinking_tool_loop(thinking):
    assert thinking.render(tool_loop(thoughts="R1", content="pre")) == (
        NO_SYSTEM
        + USER_1
        + "<|im_start|>assistant\n<think>\nR1\n</think>\n<response>\npre\n</response>\n\n"
        + CALLS
        + OPEN
    )


def test_thinking_answer_behind_tool_results(thinking):
    messages = [*tool_loop(thoughts="R1", content="pre"), A1 | {"thoughts": "R2"}, U2, *tool_loop()[2:3], U1]
    assert thinking.render(messages) == (
        NO_SYSTEM
        + USER_1
        + "<|im_start|>assistant\n<response>\npre\n</response>\n\n"
        + CALLS
        + ANSWER_1
        + USER_2
        + '<|im_start|>tool\n<tool_output>"sunny"</tool_output><|im_end|>\n\n'
        + USER_1
        + OPEN
    )


@pytest.mark.parametrize("answer", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_thinking_tool_loop_without_text(thinking, answer):
    assert thinking.render(tool_loop(**answer)) == NO_SYSTEM + USER_1 + "<|im_start|>assistant\n" + CALLS + OPEN


def test_thinking_tool_arguments_and_results_are_plain_json(thinking):
    call = {"name": "f", "arguments": {"b": "<天> & 'x'", "a": [1]}}
    messages = [U1, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": {"z": "<é>", "a": None}}]
    text = thinking.render(messages)
    assert '{"name": "f", "arguments": {"b": "<天> & \'x\'", "a": [1]}}' in text
    assert '<tool_output>{"z": "<é>", "a": null}</tool_output>' in text


def test_thinking_system_settings_and_later_system(thinking):
    block = "<|im_start|>system\n<system_setting>\n{}</system_setting>\n\n<global_setting>\nthink_mode=True\n"
    block += "</global_setting><|im_end|>\n\n"
    assert thinking.render([U1], system_settings="S") == block.format("S\n") + USER_1 + OPEN
    assert thinking.render([SYSTEM, U1], system_settings="S") == block.format("S\nSYS\n") + USER_1 + OPEN
    later = "<|im_start|>system\nSYS<|im_end|>\n\n"
    assert thinking.render([U1, SYSTEM]) == NO_SYSTEM + USER_1 + later + OPEN


def test_thinking_content_that_is_no_text_renders_empty(thinking):
    # As in the released template, for whoever renders ours elsewhere; `render` itself never lets it come so far.
    [template] = thinking._templates.values()
    parts = [{"role": "user", "content": [{"type": "text", "text": "lost"}]}]
    assert template.render(messages=parts) == NO_SYSTEM + "<|im_start|>user\n<|im_end|>\n\n" + OPEN


def test_content_parts_are_joined(thinking):
    parts = [{"type": "text", "text": "U"}, "1"]
    assert thinking.render([{"role": "user", "content": parts}]) == NO_SYSTEM + USER_1.replace("U1", "U\n1") + OPEN


def test_messages_are_left_as_they_were(thinking):
    messages = [U1, {"role": "assistant", "content": [{"type": "text", "text": "x"}], "reasoning_content": "R"}]
    before = json.dumps(messages)
    thinking.render(messages)
    assert json.dumps(messages) == before


def test_encoded_chat_has_single_special_tokens(base, thinking, tokenizer):
    ids = tokenizer.encode(base.render([U1]))
    assert ids[0] == tokenizer.token_id("<|begin_of_sentence|>")
    ids = tokenizer.encode(thinking.render([U1]))
    assert ids[0] == tokenizer.token_id("<|im_start|>")
    assert ids.count(tokenizer.token_id("<|im_end|>")) == 2
    assert ids[-2:] == [tokenizer.token_id("<think>"), tokenizer.token_id("<0x0A>")]


def test_family_is_read_off_the_tokenizer(model, tmp_path, tokenizer):
    assert ChatTemplate.load(tmp_path, tokenizer).render([U1]).startswith("<|im_start|>system")
    (tmp_path / "tokenizer.model").write_bytes(model)  # without the added <|im_start|>
    (tmp_path / "tokenizer_config.json").write_text('{"sep_token": "<|end_of_sentence|>"}')
    template = ChatTemplate.load(tmp_path, Tokenizer.load(tmp_path))
    assert template.render([U1]) == "<|begin_of_sentence|>User: U1\nAssistant: "


def test_checkpoints_own_template(tmp_path, tokenizer):
    write_template(tmp_path, "{{ bos_token }}{{ messages[0].content }}{{ extra }}")
    assert ChatTemplate.load(tmp_path, tokenizer).render([U1], extra="!") == "<s>U1!"
    (tmp_path / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert ChatTemplate.load(tmp_path, tokenizer).render([U1]) == "file: U1"


def test_named_templates(tmp_path, tokenizer):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    write_template(tmp_path, named)
    template = ChatTemplate.load(tmp_path, tokenizer)
    assert (template.render([U1]), template.render([U1], TOOLS)) == ("plain", "2 tools")
    write_template(tmp_path, named[1:])
    with pytest.raises(UserError, match=r"none of the chat templates \(tool_use\) is the default"):
        ChatTemplate.load(tmp_path, tokenizer).render([U1])


def test_environment_of_hugging_face_templates(tmp_path, tokenizer):
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}\n    {% if loop.index > 1 %}\n        {% break %}\n    {% endif %}\n{{ m.content }}\n"
        "{% endfor %}\n{{ {'b': '<é>', 'a': 1} | tojson(indent=2) }} {{ strftime_now('%Y') | length }}"
    )
    text = ChatTemplate.load(tmp_path, tokenizer).render([U1, U2])
    assert text == 'U1\n{\n  "b": "<é>",\n  "a": 1\n} 4'


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "chat template failed"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "is broken"),
        (["no name"], "neither text nor a list of named templates"),
    ],
)
def test_template_errors(tmp_path, tokenizer, template, sentence):
    write_template(tmp_path, template)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json.*{sentence}"):
        ChatTemplate.load(tmp_path, tokenizer).render([U1])


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("text", "expected an object with role and content, found str"),
        ({"content": "x"}, "role is None"),
        ({"role": "bot", "content": "x"}, "role is 'bot'"),
        ({"role": "user"}, "content must be text or a list of text parts, found NoneType"),
        ({"role": "system", "content": 5}, "content must be text or a list of text parts, found int"),
        ({"role": "assistant", "content": 5}, "content must be text or a list of text parts, found int"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url' is not supported"),
        ({"role": "user", "content": [{"type": "text"}]}, "'text' is not supported"),
        ({"role": "user", "content": [7]}, "'int' is not supported"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, "tool_calls must be a list of functions"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "each with a name and arguments"),
    ],
)
def test_malformed_messages(thinking, message, sentence):
    with pytest.raises(UserError, match=rf"^messages\[1\]: .*{sentence}"):
        thinking.render([U1, message])


@pytest.mark.parametrize("messages", [[], "hello", {"role": "user", "content": "x"}, None])
def test_messages_that_are_no_list(thinking, messages):
    with pytest.raises(UserError, match="messages must be a list"):
        thinking.render(messages)


def test_malformed_tools(thinking):
    with pytest.raises(UserError, match=r"tools\[1\]: expected a function with a name"):
        thinking.render([U1], [TOOLS[0], {"type": "function"}])
    for tools in (3, "get_weather", {"type": "function"}):
        with pytest.raises(UserError, match="tools must be a list of function tools"):
            thinking.render([U1], tools)


@pytest.mark.parametrize(
    ("messages", "tools"), [([U1], TOOLS), (tool_loop(content="pre")[:2], None), ([U1, tool_loop()[2]], None)]
)
def test_tools_for_a_template_that_knows_none(base, messages, tools):
    with pytest.raises(UserError, match="knows no tools"):
        base.render(messages, tools)
