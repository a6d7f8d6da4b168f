import json
import re

import numpy as np
import pytest

from ernie_jax.errors import UserError
from ernie_jax.text import Tokenizer
from ernie_jax.text.answer import AnswerFormat, AnswerParser, Content, Reasoning, ToolCallArguments, ToolCallStart
from ernie_jax.text.guidance import Function, Grammar, Guidance, TextConstraint, ToolConstraint

V = 5120
PLAIN = AnswerFormat(tool_calls=True)
ANSWER = AnswerFormat(response_tags=True, tool_calls=True)
THINKING = AnswerFormat(thinking=True, response_tags=True, tool_calls=True, whole_calls=True)
FORMS = [PLAIN, ANSWER]


@pytest.fixture(scope="session")
def embedded() -> Tokenizer:
    return Tokenizer.load("models/ernie-embedded")


@pytest.fixture(scope="session")
def guidance(embedded) -> Guidance:
    return Guidance(embedded, V, embedded.stop_ids())


def allowed(grammar: Grammar, size: int = V) -> np.ndarray:
    """Return the ids that may come next."""
    row = np.full(-(-size // 32), -1, np.int32)
    grammar.mask(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def draw(grammar: Grammar, tokenizer: Tokenizer, rng: np.random.Generator, size: int = V) -> str | None:
    """Choose random tokens among those allowed until the answer is finished; None if it grows too long.

    Tokens that close something are preferred now and then, as strings would hardly ever end otherwise.
    """
    ids, stops = [], tokenizer.stop_ids()
    closing = [i for i in range(tokenizer.vocab_size) if set(tokenizer.piece_bytes(i)) & set(b'"}]>') or i in stops]
    for _ in range(600):
        if grammar.finished:
            return tokenizer.decode([i for i in ids if i not in stops], skip_special=False)
        choices = allowed(grammar, size)
        assert len(choices) and choices.max() < tokenizer.vocab_size
        if rng.random() < 0.5:
            choices = np.intersect1d(choices, closing) if len(np.intersect1d(choices, closing)) else choices
        ids.append(int(rng.choice(choices)))
        assert grammar.accept(ids[-1])
    return None


def texts(grammar, tokenizer, rng, count=8, size=V) -> list[str]:
    """Draw answers that are finished; most are."""
    answers = [draw(grammar.copy(), tokenizer, rng, size) for _ in range(3 * count)]
    finished = [text for text in answers if text is not None]
    assert len(finished) >= count
    return finished


def content_of(text: str, form: AnswerFormat) -> str:
    parser = AnswerParser(form)
    return "".join(e.text for e in [*parser.feed(text), *parser.finish(False)] if isinstance(e, Content))


def calls_of(text: str, form: AnswerFormat) -> list[tuple[str, dict]]:
    parser, calls = AnswerParser(form), []
    for event in [*parser.feed(text), *parser.finish(False)]:
        match event:
            case ToolCallStart(_, _, name):
                calls.append([name, ""])
            case ToolCallArguments(index, piece):
                calls[index][1] += piece
            case Content(piece):
                raise AssertionError(f"content {piece!r} in {text!r}")
    return [(name, json.loads(arguments)) for name, arguments in calls]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "天", "c\n"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/pair"}, {"type": "null"}]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
    "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "number"}], "items": False, "minItems": 1}},
}


def check_person(value: dict) -> None:
    assert {"name", "age", "kind"} <= set(value) <= {"name", "age", "kind", "tags", "next"}
    assert len(value["name"]) <= 12 and 0 <= value["age"] <= 150 and value["kind"] in ("a", "天", "c\n")
    assert len(value.get("tags", [])) <= 3 and all(isinstance(tag, bool) for tag in value.get("tags", []))
    following = value.get("next")
    assert following is None or (len(following) == 1 and isinstance(following[0], (int, float)))


@pytest.mark.parametrize("form", FORMS)
def test_json_schema(guidance, embedded, form, rng):
    grammar = guidance.grammar(form, TextConstraint("json_schema", PERSON))
    for text in texts(grammar, embedded, rng):
        check_person(json.loads(content_of(text, form), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_json_object(guidance, embedded, form, rng):
    for text in texts(guidance.grammar(form, TextConstraint("json_object")), embedded, rng):
        assert isinstance(json.loads(content_of(text, form)), dict)


@pytest.mark.parametrize("form", FORMS)
def test_regex_choice_and_grammars(guidance, embedded, form, rng):
    for pattern in (r"[a-c]{2,5}/\d+", r"(yes|no)\n", r"(春|花).?", r"\"\\"):
        for text in texts(guidance.grammar(form, TextConstraint("regex", pattern)), embedded, rng):
            assert re.fullmatch(pattern, content_of(text, form), re.ASCII), (pattern, text)
    choices = ["a", "ab", "春天\n到", '"\\/{}\t\u2028', "x\x01"]
    for text in texts(guidance.grammar(form, TextConstraint("choice", choices)), embedded, rng):
        assert content_of(text, form) in choices
    lark = 'start: "<" start? ">" | A\nA: /[0-9]/'
    gbnf = 'root ::= "<" root? ">" | [0-9]'
    for source in (lark, gbnf):
        for text in texts(guidance.grammar(form, TextConstraint("grammar", source)), embedded, rng):
            answer = content_of(text, form)
            inner = answer.strip("<>")
            depth = answer.count("<")
            assert answer == "<" * depth + inner + ">" * depth and (
                re.fullmatch("[0-9]", inner) or (depth and not inner)
            )


WEATHER = Function(
    "get_weather",
    {"type": "object", "properties": {"city": {"enum": ["北京", "}</tool_call>"]}}, "required": ["city"],
     "additionalProperties": False},
)  # fmt: skip
PLAN = Function("plan-1", {"properties": {"steps": {"type": "array", "items": {"type": "integer"}}}}, strict=True)
NOW = Function("now")


def check_call(name: str, arguments: dict) -> None:
    match name:
        case "get_weather":
            assert arguments in ({"city": "北京"}, {"city": "}</tool_call>"})
        case "plan-1":
            assert all(isinstance(step, int) for step in arguments.get("steps", []))
        case "now":
            assert arguments == {}
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize("form", FORMS)
def test_required_calls(guidance, embedded, form, rng):
    functions = (WEATHER, NOW)
    grammar = guidance.grammar(form, tools=ToolConstraint(functions, required=True, parallel=False))
    called = [calls_of(text, form) for text in texts(grammar, embedded, rng, count=15)]
    assert all(len(calls) == 1 for calls in called)
    assert {name for [(name, _)] in called} == {"get_weather", "now"}
    for [(name, arguments)] in called:
        check_call(name, arguments)
    grammar = guidance.grammar(form, tools=ToolConstraint((*functions, PLAN), required=True))
    called = [calls_of(text, form) for text in texts(grammar, embedded, rng, count=12)]
    assert all(called) and max(map(len, called)) > 1
    for name, arguments in (call for calls in called for call in calls):
        check_call(name, arguments)


def test_the_templates_own_call_is_allowed(guidance, embedded):
    tools = ToolConstraint((WEATHER, NOW), required=True)
    for grammar in (
        guidance.grammar(ANSWER, tools=tools),
        guidance.grammar(ANSWER, TextConstraint("json_object"), tools),
    ):
        text = '\n\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
        for token in embedded.encode(text + text[1:]):
            assert grammar.accept(token)
        assert not grammar.finished and embedded.token_id("</s>") in allowed(grammar)
        assert grammar.accept(embedded.token_id("</s>")) and grammar.finished


def test_text_or_calls(guidance, embedded):
    tools = ToolConstraint((NOW,), required=False, parallel=False)
    call = '\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for form, content in ((PLAIN, "yes"), (ANSWER, "\n\n<response>\nyes\n</response>")):
        grammar = guidance.grammar(form, TextConstraint("choice", ["yes"]), tools)
        for text in (content, call):
            copied = grammar.copy()
            for token in embedded.encode(text):
                assert not copied.finished and copied.accept(token)
            assert copied.finished


def test_calls_on_demand(guidance, embedded, rng):
    """Text is free until the model opens a call, which is then guided."""
    opening, stop = embedded.token_id("<tool_call>"), embedded.token_id("</s>")
    for parallel in (True, False):
        grammar = guidance.grammar(PLAIN, tools=ToolConstraint((WEATHER,), required=False, parallel=parallel))
        assert grammar.free and len(allowed(grammar)) == embedded.vocab_size
        for token in embedded.encode("The king { said"):
            assert grammar.accept(token) and grammar.free
        assert grammar.accept(opening) and not grammar.free
        untouched = grammar.copy()
        assert stop not in allowed(grammar) and not grammar.accept(stop)
        ids = [opening]
        while not grammar.free and not grammar.finished:
            ids.append(int(rng.choice(allowed(grammar))))
            assert grammar.accept(ids[-1])
        [(name, arguments)] = calls_of(embedded.decode(ids, skip_special=False), PLAIN)
        check_call(name, arguments)
        assert grammar.finished != parallel and not untouched.free
        if parallel:
            assert grammar.free and grammar.accept(opening) and not grammar.free


def test_reasoning_comes_first(guidance, embedded, rng):
    close, stop = embedded.token_id("</think>"), embedded.token_id("</s>")
    grammar = guidance.grammar(THINKING, TextConstraint("json_schema", PERSON))
    assert not grammar.free and not grammar.finished
    ids = embedded.encode("Let { me see\n")
    for token in ids:
        assert {token, close} <= set(allowed(grammar)) and stop not in allowed(grammar)
        assert not grammar.accept(stop) and grammar.accept(token)
    assert grammar.accept(close)
    text = "Let { me see\n</think>" + texts(grammar, embedded, rng, count=1)[0]
    parser = AnswerParser(THINKING)
    events = [*parser.feed(text), *parser.finish(False)]
    assert [e.text for e in events if isinstance(e, Reasoning)] == ["Let { me see"]
    check_person(json.loads("".join(e.text for e in events if isinstance(e, Content))))

    free = guidance.grammar(THINKING, tools=ToolConstraint((NOW,), required=False))
    assert free.free and free.accept(embedded.token_id("<tool_call>")) and free.free
    assert free.accept(close) and free.free
    assert free.accept(embedded.token_id("<tool_call>")) and not free.free


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_reasoning_budget(guidance, embedded, budget, rng):
    close, newline = embedded.token_id("</think>"), embedded.encode("\n")[0]
    for text in (None, TextConstraint("choice", ["yes"])):
        grammar = guidance.grammar(THINKING, text, reasoning_budget=budget)
        word = embedded.encode(" the")[0]
        for _ in range(budget):
            assert grammar.free == (text is None) and grammar.accept(word)
        untouched = grammar.copy()
        assert not grammar.free and not grammar.accept(word)
        if budget:
            assert list(allowed(grammar)) == [newline] and grammar.accept(newline)
        assert list(allowed(grammar)) == [close] and not grammar.accept(newline) and grammar.accept(close)
        assert list(allowed(untouched)) == ([newline] if budget else [close])
        assert grammar.free == (text is None) and not grammar.finished
        if text:
            assert [content_of(t, ANSWER) for t in texts(grammar, embedded, rng, 2)][0] == "yes"
        else:
            assert grammar.accept(word)
    early = guidance.grammar(THINKING, reasoning_budget=9)
    assert early.accept(close) and early.free
    assert guidance.grammar(PLAIN, reasoning_budget=9) is None


def test_nothing_asked(guidance):
    assert guidance.grammar(THINKING) is None and guidance.grammar(PLAIN) is None


def test_masks_and_copies(guidance, embedded):
    grammar = guidance.grammar(PLAIN, TextConstraint("regex", "a(b|c)+"))
    row = np.full(V // 32, -1, np.int32)
    grammar.mask(row)
    assert row.dtype == np.int32 and len(allowed(grammar)) < 10
    for wrong in (np.zeros(V // 32, np.int64), np.zeros((1, V // 32), np.int32), np.zeros(2 * V // 32, np.int32)[::2]):
        with pytest.raises(TypeError):
            grammar.mask(wrong)
    a, b = embedded.token_id("a"), embedded.token_id("b")
    copied = grammar.copy()
    assert not grammar.accept(b) and grammar.accept(a) and not grammar.accept(a) and grammar.accept(b)
    assert a in allowed(copied) and b not in allowed(copied)
    assert set(embedded.stop_ids()) <= set(allowed(grammar)) and not grammar.finished
    # No placeholder or tag is part of a text, nor is a byte for which there is a piece.
    anything = set(allowed(guidance.grammar(PLAIN, TextConstraint("regex", "(?s:.)*"))))
    assert not anything & {embedded.token_id(t) for t in ("<|LOC_1|>", "<think>", "<tool_call>", "<unk>", "<0x61>")}
    assert {a, b, embedded.token_id("<0x0A>")} <= anything


def test_little_tokenizers(tokenizer, rng):
    """Both file formats, byte pieces in strings, and logits wider than the vocabulary."""
    size = tokenizer.vocab_size + 45
    guidance = Guidance(tokenizer, size, tokenizer.stop_ids())
    grammar = guidance.grammar(ANSWER, TextConstraint("json_schema", PERSON))
    for text in texts(grammar, tokenizer, rng, size=size):
        check_person(json.loads(content_of(text, ANSWER)))
    grammar = guidance.grammar(ANSWER, TextConstraint("choice", ["\U0001f600 天"]))
    assert [content_of(t, ANSWER) for t in texts(grammar, tokenizer, rng, 2, size)][0] == "\U0001f600 天"
    with pytest.raises(UserError, match="more than the model's 10"):
        Guidance(tokenizer, 10, tokenizer.stop_ids())


@pytest.mark.parametrize(
    "constraint, message",
    [
        (TextConstraint("json_schema", {"type": "objekt"}, "response_format.json_schema.schema"),
         r"^response_format.json_schema.schema: Invalid type: objekt$"),
        (TextConstraint("json_schema", {"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (TextConstraint("json_schema", {"$ref": "#/nope"}), "Pointer '/nope' does not exist"),
        (TextConstraint("regex", "a("), "^response_format: .*unclosed group"),
        (TextConstraint("regex", ""), "a regex must not be empty"),
        (TextConstraint("choice", []), "there must be a choice"),
        (TextConstraint("choice", ["a", ""]), "none may be empty"),
        (TextConstraint("grammar", "start: foo"), 'response_format: .*unknown name: "foo"'),
        (TextConstraint("grammar", "root ::= ((("), "response_format: "),
        (TextConstraint("grammar", "what?"), "response_format: "),
    ],
)  # fmt: skip
def test_broken_constraints(guidance, constraint, message):
    for form in (PLAIN, ANSWER, THINKING):
        with pytest.raises(UserError, match=message) as error:
            guidance.grammar(form, constraint)
        assert "\n" not in str(error.value) and "<state>" not in str(error.value)


def test_what_cannot_be_enforced_is_ignored_unless_strict(guidance):
    schema = {"type": "object", "not": {}}
    assert guidance.grammar(PLAIN, TextConstraint("json_schema", schema, strict=False))
    tools = [
        ToolConstraint((NOW, Function("f", schema, "tools[1].function", strict)), True) for strict in (False, True)
    ]
    assert guidance.grammar(PLAIN, tools=tools[0])
    with pytest.raises(UserError, match=r'^tools\[1\].function.parameters: Unimplemented keys: \["not"\]'):
        guidance.grammar(PLAIN, tools=tools[1])


def test_reasoning_needs_its_token(embedded):
    class Untagged(Tokenizer):
        def token_id(self, name):
            return (
                None
                if name.startswith(("<think", "</think", "<tool", "</tool", "<resp", "</resp"))
                else super().token_id(name)
            )

    tokenizer = Untagged(embedded._vocabulary, {})
    guidance = Guidance(tokenizer, V, tokenizer.stop_ids())
    with pytest.raises(UserError, match="no token </think>"):
        guidance.grammar(THINKING, reasoning_budget=5)
    assert guidance.grammar(PLAIN, tools=ToolConstraint((NOW,), required=False)) is None
    required = guidance.grammar(ANSWER, tools=ToolConstraint((NOW,), required=True, parallel=False))
    for token in embedded.encode("<"):
        assert required.accept(token)
