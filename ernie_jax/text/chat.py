"""Chat templates: messages to the text that a model was trained to continue."""

from __future__ import annotations

import datetime
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from etils import epath

from ernie_jax.config import read_json
from ernie_jax.errors import UserError
from ernie_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


class ChatTemplate:
    """Render chat messages with a Jinja template, in the environment that Hugging Face templates are written for.

    Args:
      source: the template, or several by name: with tools "tool_use" is taken, else "default".
      variables: what the template sees besides the conversation: the special tokens by role.
      origin: the template's file, for error sentences.

    Raises:
      UserError: if a template is no valid Jinja.
    """

    def __init__(self, source: str | Mapping[str, str], variables: Mapping[str, str], origin: str):
        sources = {"default": source} if isinstance(source, str) else source
        self._variables = dict(variables)
        self._origin = origin
        self._sources = tuple(sources.values())
        self._templates = {}
        self._take_tools = {}
        environment = _environment()
        for name, text in sources.items():
            try:
                self._take_tools[name] = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(text))
                self._templates[name] = environment.from_string(text)
            except jinja2.TemplateError as error:
                raise UserError(f"{origin}: the chat template is broken: {error}") from None

    @classmethod
    def load(cls, directory: str | os.PathLike, tokenizer: Tokenizer) -> ChatTemplate:
        """Take the chat template of a checkpoint directory, local or gs://, or else its family's.

        The directory's own is chat_template.jinja or the field chat_template of tokenizer_config.json. The family is
        read off the tokenizer: Thinking where it knows <|im_start|> and <think>, else Base and PT.

        Raises:
          UserError: if the directory's template is broken.
        """
        directory = epath.Path(directory)
        variables = tokenizer.special_tokens
        file = directory / "chat_template.jinja"
        if file.exists():
            return cls(file.read_text(encoding="utf-8"), variables, str(file))
        config = directory / "tokenizer_config.json"
        source = read_json(config).get("chat_template") if config.exists() else None
        if source:
            return cls(_named(source, str(config)), variables, str(config))
        thinking = all(tokenizer.token_id(name) is not None for name in ("<|im_start|>", "<think>"))
        return cls.of_family("thinking" if thinking else "base", variables)

    @classmethod
    def of_family(cls, family: str, variables: Mapping[str, str] | None = None) -> ChatTemplate:
        """Return the template of a family: "base" (also PT) or "thinking"."""
        name = f"templates/{family}.jinja"
        text = importlib.resources.files("ernie_jax.text").joinpath(name).read_text(encoding="utf-8")
        return cls(text, variables or {}, name)

    def mentions(self, text: str) -> bool:
        """Tell whether the template has this text in it, such as a tag that its models then write too."""
        return any(text in source for source in self._sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation, up to where the model's answer begins.

        Args:
          messages: OpenAI chat messages. Lists of text parts are joined by newlines; `reasoning_content` is what the
            Thinking template calls `thoughts`.
          tools: function tools, as {"type": "function", "function": {...}} or the inner object alone.
          add_generation_prompt: open the assistant's turn.
          **variables: further variables of the template, such as system_settings.

        Raises:
          UserError: if a message or tool is malformed (its index is named), the template knows no tools but there are
            some, or the template fails.
        """
        messages = read_messages(messages)
        if tools is not None and (isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence)):
            raise UserError("tools must be a list of function tools")
        tools = [_tool(index, tool) for index, tool in enumerate(tools or ())]
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise UserError(f"{self._origin}: none of the chat templates ({', '.join(self._templates)}) is the default")
        if not self._take_tools[name] and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)):
            raise UserError(
                f"{self._origin}: this model's chat template knows no tools; leave tools and tool calls out"
            )
        values = {**self._variables, **variables}
        values |= {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._templates[name].render(values)
        except Exception as error:  # a template is foreign code, which can fail in any way
            raise UserError(f"{self._origin}: the chat template failed: {error}") from error


def _environment() -> jinja2.Environment:
    """Return the sandbox of Hugging Face's apply_chat_template (transformers, utils/chat_template_utils.py)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Write JSON as it is: Jinja's own filter would escape it for HTML and sort its keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _named(source: str | list, origin: str) -> str | dict[str, str]:
    """Return the chat_template field of a tokenizer_config.json with a list of named templates made a mapping."""
    if isinstance(source, str):
        return source
    try:
        return {entry["name"]: entry["template"] for entry in source}
    except (TypeError, KeyError):
        raise UserError(f"{origin}: field chat_template is neither text nor a list of named templates") from None


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return OpenAI chat messages in the form that templates understand.

    Raises:
      UserError: if a message is malformed; its index is named.
    """
    if isinstance(messages, (str, Mapping)) or not messages:
        raise UserError("messages must be a list of at least one message")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object with role and content, found {type(message).__name__}")
    if (role := message.get("role")) not in ROLES:
        raise UserError(f"{where}: role is {role!r}; it must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(where, part) for part in content)
    # A tool may return any JSON value; an assistant may say nothing but its tool calls.
    if not isinstance(content, str) and role != "tool" and (role, content) != ("assistant", None):
        raise UserError(f"{where}: content must be text or a list of text parts, found {type(content).__name__}")
    message = {**message, "content": content}
    if "reasoning_content" in message:
        message.setdefault("thoughts", message["reasoning_content"])
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise UserError(f"{where}: tool_calls must be a list of functions, each with a name and arguments")
    return message


def _part(where: str, part: Any) -> str:
    """Return the text of one part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise UserError(f"{where}: content part of type {kind!r} is not supported; this model reads text only")
    return part["text"]


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str) and "arguments" in function


def _tool(index: int, tool: Any) -> dict[str, Any]:
    """Return a function tool in OpenAI's wrapping."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"tools[{index}]: expected a function with a name")
    return {"type": "function", "function": function}
