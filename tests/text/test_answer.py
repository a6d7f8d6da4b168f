import itertools
import json
import random

import pytest

from ernie_jax.text import ChatTemplate, IncrementalDetokenizer
from ernie_jax.text.answer import (
    TAGS,
    AnswerFormat,
    AnswerParser,
    Content,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    tag_ids,
    write_answer,
)

THINKING = AnswerFormat(thinking=True, response_tags=True, tool_calls=True)
WHOLE = AnswerFormat(thinking=True, response_tags=True, tool_calls=True, whole_calls=True)
PLAIN = AnswerFormat()
PLAIN_TOOLS = AnswerFormat(tool_calls=True)


def gather(events) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    """Join events to (reasoning, content, calls); None where there was none."""
    texts, calls = {Reasoning: None, Content: None}, []
    for event in events:
        match event:
            case ToolCallStart(index, _, name):
                assert index == len(calls)
                calls.append([name, ""])
            case ToolCallArguments(index, text):
                assert index == len(calls) - 1 and text
                calls[index][1] += text
            case _:
                assert event.text
                texts[type(event)] = (texts[type(event)] or "") + event.text
    return texts[Reasoning], texts[Content], [(name, text) for name, text in calls]


def parse(form, *pieces, truncated=False):
    parser = AnswerParser(form)
    return gather([*itertools.chain(*map(parser.feed, pieces)), *parser.finish(truncated)])


def call(arguments: str = '{"city": "北京"}', name: str = "get_w") -> str:
    return f'\n\n\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'


CALL = ("get_w", '{"city": "北京"}')


@pytest.mark.parametrize(
    "text, expected",
    [
        # The rows of the reference's table of vLLM's parser, with its faults mended.
        ("abc</think>def", ("abc", "def", [])),
        ("<think>abc</think>def", ("abc", "def", [])),
        ("abc\n</think>\ndef", ("abc", "def", [])),
        ("abc\n</think>\n\n<response>\ndef\n</response>\n", ("abc", "def", [])),
        ("abc", ("abc", None, [])),
        ("abc\n</think>\n\n<response>\ndef", ("abc", "def", [])),
        ("abc\n</think>" + call(), ("abc", None, [CALL])),
        ("abc\n</think>\n\n<response>\ndef\n</response>" + call(), ("abc", "def", [CALL])),
        # Line breaks: one before a closing tag, all behind it.
        ("\n<think>\n\nabc\n\n</think>\n\n\n\ndef\n\n", ("abc\n", "def", [])),
        ("abc\n</think>\n\n<response>\n\nd\n\nf\n\n</response>\n\n", ("abc", "d\n\nf\n", [])),
        ("</think><response></response>", (None, None, [])),
        ("\n</think>\n\n<response>\n\n</response>\n", (None, None, [])),
        ("a</think> b", ("a", " b", [])),
        # Text where the format has none.
        ("a</think>before\n\n<response>\nb\n</response>\nafter", ("a", "before\nb\nafter", [])),
        ("a</think>one<response> two</response> three", ("a", "one two three", [])),
        ("a</think>pre\n" + call() + "post\n", ("a", "pre\npost", [CALL])),
        ("a</think><response>\npre" + call() + "\n</response>\n", ("a", "pre", [CALL])),
        # Parallel calls, with and without a response, adjacent, or without arguments.
        ("a</think>" + call() + call("{}", "g2"), ("a", None, [CALL, ("g2", "{}")])),
        ("a</think><response>\nb\n</response>\n" + call() + call(), ("a", "b", [CALL, CALL])),
        ('a</think><tool_call>{"name":"f"}</tool_call><tool_call>{"name":"g"}</tool_call>',
         ("a", None, [("f", "{}"), ("g", "{}")])),
        # A tag is only a tag where the format has it.
        ("a <tool_call> <response></think>c</think>d<think>", ("a <tool_call> <response>", "c</think>d<think>", [])),
    ],
)  # fmt: skip
def test_thinking(text, expected):
    for form in (THINKING, WHOLE):
        assert parse(form, text) == expected
        assert parse(form, *text) == expected


@pytest.mark.parametrize(
    "inner, expected",
    [
        ('{"name": "f", "arguments": {"a": "}</tool_call>", "b": ["]", "\\"}"]}}',
         ("f", '{"a": "}</tool_call>", "b": ["]", "\\"}"]}')),
        ('{"name":"f","arguments":{"a":{"b":[{},[1.5e3,-2]]},"c":null,"d":true}}',
         ("f", '{"a":{"b":[{},[1.5e3,-2]]},"c":null,"d":true}')),
        # Any order, further members, nothing to pass on, an escaped name.
        ('{"arguments": {"a": 1}, "name": "f"}', ("f", '{"a": 1}')),
        ('{"type": "function", "id": 7, "name": "f", "x": [{"y": "}"}], "arguments": {}}', ("f", "{}")),
        ('{"name": "f", "arguments": null}', ("f", "{}")),
        ('{"name": "\\u5929"}', ("天", "{}")),
        # What models get wrong at the end of a call, and in strings.
        ('{"name": "f", "arguments": {"a": 1}', ("f", '{"a": 1}')),
        ('{"name": "f", "arguments": {"a": 1}}}}', ("f", '{"a": 1}')),
        ('{"name": "f", "arguments": {"a": 1},}', ("f", '{"a": 1}')),
        ('{"name": "f", "arguments": {"a": "b\nc\td"}}', ("f", '{"a": "b\\nc\\td"}')),
        ('{"name": "f", "arguments": {"a": 1}} and', ("f", '{"a": 1}')),
    ],
)  # fmt: skip
def test_calls(inner, expected):
    for form, before, behind in itertools.product((THINKING, WHOLE), ("\n", ""), ("\n", "")):
        text = f"a</think><tool_call>{before}{inner}{behind}</tool_call>" + call()
        content = "and" if inner.endswith("and") else None
        assert parse(form, text) == ("a", content, [expected, CALL])
        assert parse(form, *text) == ("a", content, [expected, CALL])
    json.loads(expected[1])


@pytest.mark.parametrize(
    "inner",
    ["", "\n", "what?", "{}", "{'name': 'f'}", '{"name": 5}', '{"name": ""}', '{"arguments": {"a": 1}}', "[1]",
     '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "{}"}', '{"name" "f"}', '{"name": "f" oops}',
     '{"name": "\\d", "arguments": {}}', '{"name": "' + 300 * "x" + '", "arguments": {}}'],
)  # fmt: skip
def test_what_is_no_call_is_content(inner):
    malformed = f"\n\n<tool_call>\n{inner}\n</tool_call>"
    for form in (PLAIN_TOOLS, AnswerFormat(tool_calls=True, whole_calls=True)):
        text = "say" + malformed + "\n more" + call() + call("{}", "g2")
        assert parse(form, text) == (None, "say" + malformed + "\n more", [CALL, ("g2", "{}")])
        assert parse(form, *text) == (None, "say" + malformed + "\n more", [CALL, ("g2", "{}")])
    assert parse(THINKING, "a</think>" + malformed + call()) == ("a", malformed.lstrip("\n"), [CALL])


@pytest.mark.parametrize("arguments", ['{"a": }', '{"a": [}', "{a: 1}", '{"a": 1 <b>}', "{\"a\": 'b'}"])
def test_arguments_that_are_no_json(arguments):
    """A call whose beginning was shown stays one; given as a whole it is content."""
    malformed = call(arguments)
    text = "a</think>" + malformed + call()
    assert parse(WHOLE, *text) == ("a", malformed.strip(), [CALL])
    reasoning, content, calls = parse(THINKING, text)
    assert (reasoning, content, calls[1]) == ("a", None, CALL)
    assert calls[0][0] == "get_w" and calls[0][1].rstrip("}\n") == arguments.rstrip("}")


def test_a_call_in_a_broken_call():
    assert parse(WHOLE, "</think><tool_call> <tool_call>" + call()) == (None, "<tool_call> <tool_call>", [CALL])
    broken = '<tool_call>{"name": "f", "arguments": {"a'
    assert parse(WHOLE, "</think>" + broken + call()) == (None, broken, [CALL])


def test_plain_answers_pass_through():
    text = "\n x <think></think> <response>\n</response>" + call() + "\n\n"
    parser = AnswerParser(PLAIN)
    assert [parser.feed(c) for c in text] == [[Content(c)] for c in text]
    assert parser.finish() == []
    assert parse(PLAIN_TOOLS, " a\n\n") == (None, " a\n\n", [])
    assert parse(PLAIN_TOOLS, " \n") == (None, " \n", [])
    assert parse(PLAIN_TOOLS, "pre" + call()) == (None, "pre", [CALL])


def test_tool_choice_none_looks_for_no_calls():
    form = AnswerFormat(thinking=True, response_tags=True)
    assert parse(form, "a</think><response>\nb" + call() + "</response>") == ("a", "b" + call()[:-1], [])


def test_only_one_call_if_parallel_ones_are_not_wanted():
    form = AnswerFormat(tool_calls=True, parallel=False)
    parser = AnswerParser(form)
    parser.feed("pre" + call()[:-1])
    assert parser.over and parser.calls == 1
    assert parser.feed(call()) == [] and parser.finish() == []
    assert parse(form, call() + "post" + call()) == (None, None, [CALL])


DOCUMENTS = [
    "abc\n</think>\n\n<response>\ndef\n</response>\n" + call() + call("{}", "g2"),
    "abc</think>def" + call('{"a": "<tool_call>}</tool_call>"}'),
    "abc\n</think>" + call() + "\n<response>\ndef\n</response>\n",
]


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("form", [THINKING, WHOLE])
def test_no_tag_leaks_from_an_answer_cut_off_anywhere(document, form):
    whole = parse(form, document)
    for end in range(len(document)):
        reasoning, content, calls = parse(form, *document[:end], truncated=True)
        assert whole[0].startswith(reasoning or "")
        assert (whole[1] or "").startswith(content or "") and not (content or "").endswith("\n")
        assert "<" not in (reasoning or "") + (content or "")
        for (name, arguments), (_, all_arguments) in zip(calls, whole[2], strict=False):
            assert name in ("get_w", "g2") and all_arguments.startswith(arguments)


def test_the_end_of_the_stream():
    """What may begin a tag is dropped if the answer was cut off there, and text if the model had ended."""
    for text, cut, ended in [
        ("a\n</thi", ("a", None, []), ("a\n</thi", None, [])),
        ("a</think>b <", ("a", "b ", []), ("a", "b <", [])),
        ("a</think>b\n\n<tool", ("a", "b", []), ("a", "b\n\n<tool", [])),
        ("a</think>b\n<tool_call>{", ("a", "b", []), ("a", "b\n<tool_call>{", [])),
        ("a</think>b\n", ("a", "b", []), ("a", "b", [])),
        ("a</think>b <x", ("a", "b <x", []), ("a", "b <x", [])),
        ("<thi", (None, None, []), ("<thi", None, [])),
        ("", (None, None, []), (None, None, [])),
    ]:
        assert parse(THINKING, text, truncated=True) == cut
        assert parse(THINKING, text, truncated=False) == ended
    started = 'a</think><tool_call>{"name": "f", "arguments": {"a": "b'
    assert parse(THINKING, started, truncated=True) == ("a", None, [("f", '{"a": "b')])
    assert parse(WHOLE, started, truncated=True) == ("a", None, [("f", '{"a": "b')])
    assert parse(WHOLE, started, truncated=False) == ("a", started.removeprefix("a</think>"), [])
    parser = AnswerParser(THINKING)
    parser.finish()
    assert parser.feed("more") == [] and parser.finish() == []


PARTS = [*TAGS, "\n", "\n\n", " ", "a", "天", "<", "</", "}", '"', '{"name": "f", "arguments": ', '{"a": "', "{}", ",",
         '{"name": "g"}', "<tool_call>\n", "\\", "x\n", "]", "["]  # fmt: skip


def test_any_cut_of_any_text():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(6000):
        form = AnswerFormat(*(rng.random() < p for p in (0.5, 0.5, 0.8, 0.8, 0.5)))
        text = "".join(rng.choices(PARTS, k=rng.randrange(16)))
        if rng.random() < 0.3:
            text = rng.choice(DOCUMENTS)[: rng.randrange(200)] + text
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(12)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        truncated = rng.random() < 0.5
        whole = parse(form, text, truncated=truncated)
        assert parse(form, *pieces, truncated=truncated) == whole, (form, pieces, truncated)
        assert parse(form, *text, truncated=truncated) == whole, (form, text, truncated)


def test_nothing_is_lost_but_tags_and_line_breaks():
    """The characters that are no tag and no line break come out, in order, in whole answers."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(2000):
        parts = rng.choices(["<response>", "</response>", "\n", "a", "b c", "<", "<tool_call>", "</tool_call>"], k=12)
        text = "r</think>" + "".join(parts)
        _, content, calls = parse(THINKING, text)
        assert calls == []
        expected = text.removeprefix("r</think>").replace("<response>", "").replace("</response>", "")
        assert (content or "").replace("\n", "").strip() == expected.replace("\n", "").strip(), text


def test_holds_back_no_more_than_it_must():
    parser = AnswerParser(THINKING, new_id=lambda: "call_1")
    assert parser.feed("ab\n") == [Reasoning("ab")] and parser.in_reasoning
    assert parser.feed("\n</th") == [Reasoning("\n")]
    assert parser.feed("at") == [Reasoning("\n</that")]
    assert parser.feed("</think>") == [] and not parser.in_reasoning
    assert parser.feed("\n\n<response>\n") == []
    assert parser.feed("x\n\n") == [Content("x")]
    assert parser.feed("<") == []
    assert parser.feed("b> <tool_cal") == [Content("\n\n<b> ")]
    assert parser.feed("l>\n{") == []
    assert parser.feed('"name": "f", "arguments":') == []
    assert parser.feed(' {"a') == [ToolCallStart(0, "call_1", "f"), ToolCallArguments(0, '{"a')]
    assert parser.feed('": "\\') == [ToolCallArguments(0, '": "\\')]
    assert parser.feed('"</tool_call>') == [ToolCallArguments(0, '"</tool_call>')]
    assert parser.feed('"}}\n') == [ToolCallArguments(0, '"}')]
    assert parser.feed("</tool_call>\n") == []
    assert parser.feed("y") == [Content("\ny")]
    assert parser.finish() == []


def test_every_call_has_an_id_of_its_own():
    parser = AnswerParser(PLAIN_TOOLS)
    ids = [event.id for event in parser.feed(call() + call()) if isinstance(event, ToolCallStart)]
    assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)


def test_format_of_a_template():
    question = [{"role": "user", "content": "U"}]
    base, thinking = ChatTemplate.of_family("base"), ChatTemplate.of_family("thinking")
    assert AnswerFormat.of(base, base.render(question)) == PLAIN
    assert AnswerFormat.of(thinking, thinking.render(question)) == THINKING


def test_answers_are_what_the_template_writes():
    """Rendering what was parsed gives the text back: the next turn finds its prefix in the cache."""
    template, question = ChatTemplate.of_family("thinking"), {"role": "user", "content": "U"}
    prompt = template.render([question])
    for answer in (
        "abc\n</think>\n<response>\ndef\n</response>\n",
        "abc\n</think>\n<response>\ndef\n</response>\n" + call()[1:] + call('{"a":{}}', "g")[1:],
        "abc\n</think>\n\n" + call()[3:] + call("{}", "g")[1:],
    ):
        reasoning, content, calls = parse(THINKING, answer)
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
        message["tool_calls"] = [{"function": {"name": name, "arguments": text}} for name, text in calls]
        rendered = template.render([question, message])
        assert rendered.startswith(prompt + answer + "<|im_end|>"), answer


def test_detokenizer_keeps_tags(tokenizer):
    ids = tokenizer.encode("a</think><|im_end|>")
    assert tag_ids(tokenizer) <= {tokenizer.token_id(tag) for tag in TAGS}
    keep = frozenset(ids)
    assert "<|im_end|>" not in tokenizer.decode(ids)
    stream = IncrementalDetokenizer(tokenizer, keep=keep)
    assert "".join(map(stream.push, ids)) + stream.flush() == "a</think><|im_end|>"


@pytest.mark.parametrize("form", [THINKING, PLAIN_TOOLS])
@pytest.mark.parametrize("content", ["It is sunny.", None])
@pytest.mark.parametrize("calls", [[], [("get_w", '{"city": "北京"}'), ('say "it"', "{}")]])
def test_what_is_written_is_parsed_back(form, content, calls):
    thoughts = "Two steps.\nThen one." if form.thinking else None
    tool_calls = [{"type": "function", "function": {"name": name, "arguments": text}} for name, text in calls]
    message = {"role": "assistant", "reasoning_content": thoughts, "content": content, "tool_calls": tool_calls}
    assert parse(form, write_answer(form, message)) == (thoughts, content, calls)
    for tool_call in tool_calls:
        tool_call["function"]["arguments"] = json.loads(tool_call["function"]["arguments"])
    assert parse(form, write_answer(form, message)) == (thoughts, content, calls)


def test_an_answer_is_written_in_the_thinking_models_form():
    message = {"reasoning_content": "R", "content": "A", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    assert write_answer(THINKING, message) == (
        "R\n</think>\n\n<response>\nA\n</response>\n"
        '\n\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    )
    assert write_answer(PLAIN, {"content": "A"}) == "A"
