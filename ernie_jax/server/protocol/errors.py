"""Errors in OpenAI's JSON shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ernie_jax.errors import UserError

# Sentences of the lower floors begin with the path of a field, where they are about one.
_ROOTS = r"messages|tools|response_format|structured_outputs|guided_\w+|text|prompt|input"
_PATH = re.compile(rf"((?:{_ROOTS})\b[\w.\[\]]*): ")


class ApiError(UserError):
    """Refuse a request, in one sentence.

    Attributes:
      param: the path of the field at fault, such as messages[0].content; None if it is no single field.
      code: OpenAI's short name of the error, where it has one.
      status: of the HTTP response.
      type: OpenAI's class of the error; it goes with the status.
      headers: of the response, such as retry-after.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.headers = dict(headers or {})
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")

    @classmethod
    def of(cls, error: UserError, param: str | None = None) -> ApiError:
        """Return a user's error as the API's; `param` if it is none yet and its sentence names no field."""
        if isinstance(error, ApiError):
            return error
        path = _PATH.match(str(error))
        return cls(str(error), path[1] if path else param, "invalid_value" if path or param else None)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def model_not_found(name: str, known: str) -> ApiError:
    return ApiError(f"The model '{name}' does not exist; this server has '{known}'.", "model", "model_not_found", 404)


def context_exceeded(context: int, prompt: int, output: int, param: str) -> ApiError:
    """Say that prompt and answer don't fit, in the words that clients look for."""
    return ApiError(
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + output} tokens "
        f"({prompt} in the prompt, {output} in the completion); make one of them shorter.",
        param,
        "context_length_exceeded",
    )
