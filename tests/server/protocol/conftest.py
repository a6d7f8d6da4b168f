"""The model's recommended settings, and what tests of all endpoints need."""

import json

import pytest

from ernie_jax.engine.sampling import SamplingParams
from ernie_jax.server.protocol import ApiError, Fields, parse_body
from ernie_jax.text import Tokenizer

DEFAULTS = SamplingParams(temperature=0.7, top_p=0.8)


@pytest.fixture(scope="session")
def embedded() -> Tokenizer:
    return Tokenizer.load("models/ernie-embedded")


@pytest.fixture
def parse():
    """Read a request as it comes over the wire, from its fields."""

    def parse(kind, defaults=DEFAULTS, **fields):
        read: Fields = parse_body(json.dumps(fields).encode())
        return kind.parse(read, defaults) if defaults else kind.parse(read)

    return parse


@pytest.fixture
def refused(parse):
    """Check that a request is refused because of a field, and return the error."""

    def refused(kind, param, code, defaults=DEFAULTS, **fields) -> str:
        with pytest.raises(ApiError) as caught:
            parse(kind, defaults, **fields)
        error = caught.value
        assert (error.param, error.code, error.status, error.type) == (param, code, 400, "invalid_request_error")
        assert error.body["error"] == {"message": str(error), "type": error.type, "param": param, "code": code}
        assert "\n" not in str(error) and str(error).endswith(".")
        return str(error)

    return refused
