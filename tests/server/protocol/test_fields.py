import json

import pytest

from ernie_jax.errors import UserError
from ernie_jax.server.protocol import (
    ApiError,
    Fields,
    context_exceeded,
    model_not_found,
    named_event,
    parse_body,
    plain_event,
)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_bodies_that_are_no_json(body):
    with pytest.raises(ApiError, match="The body of the request is no JSON") as caught:
        parse_body(body)
    assert caught.value.code == "invalid_json" and caught.value.status == 400


@pytest.mark.parametrize("body", [b"[]", b"null", b'"a"', b"3"])
def test_bodies_that_are_no_object(body):
    with pytest.raises(ApiError, match="expected an object") as caught:
        parse_body(body)
    assert caught.value.code == "invalid_type"


def test_kinds_and_paths():
    fields = Fields({"i": 2.0, "b": True, "f": 1, "s": "x", "l": ["a", 1], "o": {"p": {"q": 1}}, "n": None}, "root[0]")
    assert fields.get("i", "an integer") == 2 and isinstance(fields.get("i", "an integer"), int)
    assert fields.get("f", "a number") == 1 and fields.get("n", "a string", "d") == "d"
    for name, kind, found in [
        ("b", "an integer", "a boolean"), ("b", "a number", "a boolean"), ("s", "a boolean", "a string"),
        ("f", "a string", "an integer"), ("l", "an object", "an array"), ("o", "an array", "an object"),
    ]:  # fmt: skip
        with pytest.raises(ApiError, match=f"'root\\[0\\].{name}': expected {kind}, but got {found} instead") as caught:
            fields.get(name, kind)
        assert caught.value.param == f"root[0].{name}"
    with pytest.raises(ApiError) as caught:
        fields.strings("l")
    assert caught.value.param == "root[0].l[1]"
    with pytest.raises(ApiError) as caught:
        fields.object("o").object("p").done()
    assert (caught.value.param, caught.value.code) == ("root[0].o.p.q", "unknown_parameter")
    fields.done()


def test_errors_of_lower_floors():
    error = ApiError.of(UserError("response_format.json_schema.schema: Invalid type: objekt"))
    assert (error.param, error.code) == ("response_format.json_schema.schema", "invalid_value")
    assert ApiError.of(UserError("messages[3]: role is 5")).param == "messages[3]"
    assert ApiError.of(UserError("tools[1].function.parameters: no")).param == "tools[1].function.parameters"
    assert ApiError.of(UserError("guided_regex: unclosed group")).param == "guided_regex"
    assert ApiError.of(UserError("structured_outputs.grammar: no")).param == "structured_outputs.grammar"
    assert ApiError.of(UserError("the model: is broken")).param is None
    assert ApiError.of(UserError("too long"), "prompt").param == "prompt"
    assert ApiError.of(error) is error


def test_statuses():
    error = model_not_found("gpt", "ernie")
    assert (error.status, error.type, error.param, error.code) == (404, "not_found_error", "model", "model_not_found")
    assert ApiError("slow down", status=429).type == "rate_limit_error"
    assert ApiError("broken", status=500).type == "server_error"
    assert ApiError("too large", status=413).type == "invalid_request_error"
    error = context_exceeded(100, 90, 20, "max_tokens")
    assert error.code == "context_length_exceeded" and "maximum context length is 100 tokens" in str(error)


def test_events():
    assert plain_event({"a": "天\n"}) == 'data: {"a":"天\\n"}\n\n'.encode()
    assert named_event({"type": "t"}) == b'event: t\ndata: {"type":"t"}\n\n'
    assert json.loads(plain_event({"a": "\ud800"})[6:]) == {"a": "\ud800"}
