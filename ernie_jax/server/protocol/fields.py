"""Reading JSON requests field by field, with errors that name the path of the field."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ernie_jax.server.protocol.errors import ApiError

_KINDS = {
    "a string": str,
    "a boolean": bool,
    "an integer": int,
    "a number": (int, float),
    "an array": list,
    "an object": dict,
}


def parse_body(body: bytes) -> Fields:
    """Read the JSON object that a request consists of.

    Raises:
      ApiError: if it is none.
    """
    try:
        return Fields(json.loads(body, parse_constant=_refuse_constant))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ApiError):
            raise
        raise ApiError(f"The body of the request is no JSON: {error}.", code="invalid_json") from None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


class Fields:
    """One JSON object of a request, at a path in it. A field that is null counts as absent, as OpenAI has it."""

    def __init__(self, value: Any, path: str = ""):
        check_kind(value, "an object", path or "the body")
        self._values: Mapping[str, Any] = value
        self._read: set[str] = set()
        self.path = path

    def at(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str, kind: str | None = None, default: Any = None) -> Any:
        """Return a field of one of the kinds "a string", "a boolean", ...; of any if None.

        Raises:
          ApiError: if it is of another kind.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            return default
        return check_kind(value, kind, self.at(name)) if kind else value

    def require(self, name: str, kind: str | None = None) -> Any:
        """Return a field that must be there."""
        value = self.get(name, kind)
        if value is None:
            raise ApiError(
                f"Missing required parameter: '{self.at(name)}'.", self.at(name), "missing_required_parameter"
            )
        return value

    def choice(self, name: str, options: Collection[str], default: str | None = None) -> str | None:
        """Return a string field that has only certain values."""
        value = self.get(name, "a string", default)
        if value is not None and value not in options:
            raise self.invalid(name, f"'{value}'; supported values are {', '.join(map(repr, options))}")
        return value

    def object(self, name: str) -> Fields | None:
        """Return an object field for reading."""
        value = self.get(name, "an object")
        return None if value is None else Fields(value, self.at(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """Give the objects of an array field."""
        for index, value in enumerate(self.get(name, "an array", ())):
            yield Fields(value, f"{self.at(name)}[{index}]")

    def strings(self, name: str) -> list[str]:
        """Return an array field of strings."""
        values = self.get(name, "an array", [])
        return [check_kind(value, "a string", f"{self.at(name)}[{index}]") for index, value in enumerate(values)]

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """Return an integer field within bounds."""
        value = self.get(name, "an integer", default)
        if value is not None and not low <= value <= high:
            raise self.invalid(name, f"{value}; it must be from {low} to {high}")
        return value

    def ignore(self, names: Collection[str]) -> None:
        """Accept fields that change nothing here."""
        self._read.update(names)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuse fields that are known and not supported, unless null, false or empty."""
        for name, reason in reasons.items():
            if self.get(name) not in (None, False, "", [], {}):
                raise ApiError(f"'{self.at(name)}' is not supported: {reason}.", self.at(name), "unsupported_parameter")

    def neutral(self, values: Mapping[str, Collection[Any]]) -> None:
        """Accept fields only with values under which they change nothing."""
        for name, accepted in values.items():
            value = self.get(name)
            if value is not None and value not in accepted:
                raise ApiError(
                    f"'{self.at(name)}' is not supported here, other than as {accepted[0]!r}.",
                    self.at(name),
                    "unsupported_parameter",
                )

    def done(self) -> None:
        """Refuse the fields that nobody has read."""
        if unknown := [name for name in self._values if name not in self._read]:
            path = self.at(unknown[0])
            raise ApiError(f"Unknown parameter: '{path}'.", path, "unknown_parameter")

    def invalid(self, name: str, why: str) -> ApiError:
        """Return the error that a field has a wrong value."""
        return ApiError(f"Invalid value for '{self.at(name)}': {why}.", self.at(name), "invalid_value")


def check_kind(value: Any, kind: str, path: str) -> Any:
    """Return a JSON value if it is of a kind.

    Raises:
      ApiError: if not; a boolean is no number, and a whole number may be written with a point.
    """
    if kind == "an integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "a boolean"):
        found = next((name for name, types in _KINDS.items() if isinstance(value, types)), "null")
        raise ApiError(f"Invalid type for '{path}': expected {kind}, but got {found} instead.", path, "invalid_type")
    return value
