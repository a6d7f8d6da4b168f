"""Tools of a request: what the prompt shows of them, and which calls an answer may have."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ernie_jax.server.protocol.errors import ApiError
from ernie_jax.server.protocol.fields import Fields
from ernie_jax.text.guidance import Function, ToolConstraint

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_MODES = ("none", "auto", "required")


@dataclasses.dataclass(frozen=True)
class Tools:
    """The functions that a request offers.

    Attributes:
      prompt: what the chat template shows; nothing if the model must call none of them.
      constraint: which calls the answer may have; None for none.
      given: the request's own tools and tool_choice, which /v1/responses repeats.
    """

    prompt: tuple[dict[str, Any], ...] = ()
    constraint: ToolConstraint | None = None
    given: tuple[list, Any] = ((), "auto")


def read_tools(fields: Fields, nested: bool) -> Tools:
    """Read tools, tool_choice and parallel_tool_calls.

    Args:
      nested: whether functions and choices are wrapped as {"type": "function", "function": {...}}, as chat has it, or
        lie flat beside the type, as /v1/responses has it.

    Raises:
      ApiError: if a tool is no function, or is malformed, or the choice names one that is not there.
    """
    parallel = fields.get("parallel_tool_calls", "a boolean", True)
    shown, functions = [], []
    for tool in fields.objects("tools"):
        function = _function_of(tool, nested)
        name = function.require("name", "a string")
        if not _NAME.fullmatch(name):
            raise function.invalid("name", f"'{name}'; it must have 1 to 64 letters, digits, _, - or .")
        description = function.get("description", "a string")
        parameters = function.get("parameters", "an object")
        strict = function.get("strict", "a boolean", False)
        function.done()
        tool.done()
        members = {"name": name, "description": description, "parameters": parameters}
        shown.append({"type": "function", "function": {k: v for k, v in members.items() if v is not None}})
        functions.append(Function(name, parameters, function.path, strict))

    mode, names, one = _choice(fields, nested)
    given = (list(fields.get("tools", default=())), fields.get("tool_choice", default="auto"))
    if not functions:
        if mode == "required":
            raise fields.invalid("tool_choice", "it asks for a call, but there are no 'tools'")
        return Tools(given=given)
    if mode == "none":
        return Tools(given=given)
    if names is not None:
        if missing := [name for name in names if name not in {function.name for function in functions}]:
            raise fields.invalid("tool_choice", f"there is no function '{missing[0]}' in 'tools'")
        functions = [function for function in functions if function.name in names]
    return Tools(tuple(shown), ToolConstraint(tuple(functions), mode == "required", parallel and not one), given)


def _function_of(tool: Fields, nested: bool) -> Fields:
    """Return the fields of a function tool."""
    kind = tool.require("type", "a string")
    if kind != "function":
        raise ApiError(
            f"'{tool.path}' is a tool of type '{kind}'; only functions are supported.",
            tool.at("type"),
            "unsupported_value",
        )
    if not nested:
        tool.ignore(("defer_loading",))
        return tool
    tool.require("function", "an object")
    return tool.object("function")


def _choice(fields: Fields, nested: bool) -> tuple[str, list[str] | None, bool]:
    """Read tool_choice: a mode, the functions it is narrowed to, and whether it asks for one call of one function."""
    if isinstance(fields.get("tool_choice", default="auto"), str):
        return fields.choice("tool_choice", _MODES, "auto"), None, False
    choice = fields.object("tool_choice")
    if choice.choice("type", ("function", "allowed_tools"), "function") == "function":
        return "required", [_named(choice, nested)], True
    if nested:
        choice.require("allowed_tools", "an object")
    allowed = choice.object("allowed_tools") if nested else choice
    return (
        allowed.choice("mode", _MODES[1:], "auto"),
        [_named(tool, nested) for tool in allowed.objects("tools")],
        False,
    )


def _named(choice: Fields, nested: bool) -> str:
    """Return the name of the function that {"type": "function", ...} points to."""
    if not nested:
        return choice.require("name", "a string")
    choice.require("function", "an object")
    return choice.object("function").require("name", "a string")
