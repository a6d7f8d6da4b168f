"""Kinds of fields that a user writes: what each is called, and whether a value is of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_jax.errors import UserError

_KINDS = {
    "int": ("a whole number", int),
    "float": ("a number", float),
    "str": ("a text", str),
    "bool": ("true or false", bool),
    "Mapping[str, Any]": ("a table", Mapping),
    "Sequence[str]": ("a list of texts", Sequence),
}


def check_fields(owner: Any, what: str) -> None:
    """Check the fields of a frozen dataclass against their annotations; whole numbers are numbers too.

    Args:
      what: stands before a field's name where it is told.

    Raises:
      UserError: naming the field, if its value is of another kind, or a number that is negative or not finite.
    """
    for field in dataclasses.fields(owner):
        kind, value = field.type, getattr(owner, field.name)
        if kind == "float" and type(value) is int:
            object.__setattr__(owner, field.name, value := float(value))
        if not _is_of(kind, value):
            raise UserError(f"{what}{field.name} must be {_describe(kind)}, found {value!r}")
        if kind == "float" and not 0 <= value < float("inf"):
            raise UserError(f"{what}{field.name} is {value}: it must be a number from 0 up")


def _describe(kind: str) -> str:
    return _KINDS[kind.removesuffix(" | None")][0]


def _is_of(kind: str, value) -> bool:
    if kind.endswith(" | None"):
        return value is None or _is_of(kind.removesuffix(" | None"), value)
    if kind == "Sequence[str]":
        return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
    return isinstance(value, _KINDS[kind][1]) and isinstance(value, bool) == (kind == "bool")
