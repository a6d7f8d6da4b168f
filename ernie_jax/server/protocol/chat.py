"""/v1/chat/completions: its requests, answers and stream chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ernie_jax.engine.sampling import SamplingParams
from ernie_jax.server.protocol.errors import ApiError
from ernie_jax.server.protocol.fields import Fields
from ernie_jax.server.protocol.generation import (
    Generation,
    Usage,
    read_constraint,
    read_generation,
    read_top_logprobs,
)
from ernie_jax.server.protocol.tools import Tools, read_tools
from ernie_jax.text.answer import AnswerFormat, Content, Event, Reasoning, ToolCallArguments, ToolCallStart
from ernie_jax.text.chat import ChatTemplate
from ernie_jax.text.guidance import Grammar, Guidance, TextConstraint

# Tokens of reasoning that an effort stands for; None is no limit. Thinking can't be switched off, only cut to nothing.
EFFORTS = {"none": 0, "minimal": 256, "low": 1024, "medium": 8192, "high": None, "xhigh": None, "max": None}

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_REFUSED = {
    "functions": "use 'tools'",
    "function_call": "use 'tool_choice'",
    "audio": "this model writes text only",
    "web_search_options": "this server has no tools of its own",
    "moderation": "this server does not moderate",
    "prompt_logprobs": "use /v1/completions with 'echo'",
    "truncate_prompt_tokens": "shorten the messages",
}
_NEUTRAL = {"add_generation_prompt": (True,), "continue_final_message": (False,), "separate_reasoning": (True,)}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a chat is rendered from, and what its answers must be; shared with /v1/responses and /tokenize.

    Attributes:
      messages: in the form of ChatTemplate.render.
      variables: further variables of the template.
      reasoning_budget: the most tokens of reasoning; None is no limit.
    """

    messages: list[dict[str, Any]]
    tools: Tools = Tools()
    text: TextConstraint | None = None
    reasoning_budget: int | None = None
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)

    def render(self, template: ChatTemplate) -> str:
        """Return the prompt.

        Raises:
          UserError: if the template can't show the conversation.
        """
        return template.render(self.messages, self.tools.prompt or None, **self.variables)

    def format(self, template: ChatTemplate, prompt: str, stream: bool) -> AnswerFormat:
        """Return how to parse the answers to a rendered prompt."""
        form, constraint = AnswerFormat.of(template, prompt), self.tools.constraint
        return dataclasses.replace(
            form,
            tool_calls=form.tool_calls and constraint is not None,
            parallel=constraint is None or constraint.parallel,
            whole_calls=not stream,
        )

    def grammar(self, guidance: Guidance, form: AnswerFormat) -> Grammar | None:
        """Return the grammar of the answers, None if they are free.

        Raises:
          UserError: if a constraint is broken or can't be enforced.
        """
        return guidance.grammar(form, self.text, self.tools.constraint, self.reasoning_budget)


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request of /v1/chat/completions; `model` is None if it names none."""

    model: str | None
    conversation: Conversation
    generation: Generation

    @classmethod
    def parse(cls, fields: Fields, defaults: SamplingParams) -> ChatRequest:
        """Read a request; `defaults` are the model's recommended settings.

        Raises:
          ApiError: naming the field.
        """
        fields.refuse(_REFUSED)
        fields.neutral(_NEUTRAL)
        fields.ignore(("prediction", "verbosity"))
        if (modalities := fields.strings("modalities")) and modalities != ["text"]:
            raise fields.invalid("modalities", f"{modalities}; this model writes text only")
        request = cls(
            model=fields.get("model", "a string"),
            conversation=read_conversation(fields, read_constraint(fields)),
            generation=read_generation(
                fields, defaults, ("max_completion_tokens", "max_tokens"), read_top_logprobs(fields)
            ),
        )
        fields.done()
        return request


def read_conversation(fields: Fields, text: TextConstraint | None = None) -> Conversation:
    """Read messages, tools, chat_template_kwargs and the limits of reasoning."""
    fields.require("messages", "an array")
    messages = [read_message(message) for message in fields.objects("messages")]
    if not messages:
        raise fields.invalid("messages", "it must have at least one message")
    variables = dict(fields.get("chat_template_kwargs", "an object", {}))
    if fixed := {"messages", "tools", "add_generation_prompt"} & variables.keys():
        raise fields.invalid("chat_template_kwargs", f"it can't set '{min(fixed)}'")
    thinking = fields.get("enable_thinking", "a boolean", variables.get("enable_thinking"))
    budget = EFFORTS[fields.choice("reasoning_effort", EFFORTS, "high")]
    if thinking is False:
        budget = 0
    budget = fields.integer("reasoning_max_tokens", 0, 2**31 - 1, budget)
    return Conversation(messages, read_tools(fields, nested=True), text, budget, variables)


def read_message(message: Fields) -> dict[str, Any]:
    """Return a message as templates take it. What else clients put into messages, they may: they send back our own.

    Raises:
      ApiError: naming the field.
    """
    role = _ROLES[message.choice("role", _ROLES) or message.require("role")]
    message.refuse({"function_call": "use 'tool_calls'", "audio": "this model reads text only"})
    result: dict[str, Any] = {"role": role, "content": read_content(message, ("text", "refusal"))}
    for name in ("name", "tool_call_id"):
        if value := message.get(name, "a string"):
            result[name] = value
    for name in ("reasoning_content", "reasoning", "thoughts"):
        value = message.get(name, "a string")
        if value is not None and role == "assistant":
            result.setdefault("reasoning_content", value)
    if calls := [_read_call(call) for call in message.objects("tool_calls")]:
        if role != "assistant":
            raise message.invalid("tool_calls", "only the assistant calls tools")
        result["tool_calls"] = calls
    if result["content"] is None and role == "assistant" and not calls:
        result["content"] = ""
    if result["content"] is None and role != "assistant":
        raise ApiError(
            f"Missing required parameter: '{message.at('content')}'.",
            message.at("content"),
            "missing_required_parameter",
        )
    return result


def read_content(message: Fields, kinds: Sequence[str], name: str = "content") -> str | None:
    """Return the text of a message, whose parts are joined by line breaks."""
    content = message.get(name)
    if content is None or isinstance(content, str):
        return content
    texts = []
    if not isinstance(content, list):
        message.get(name, "a string")
    for part in message.objects(name):
        kind = part.require("type", "a string")
        if kind not in kinds:
            raise ApiError(
                f"'{part.path}' is a content part of type '{kind}'; this model reads text only.",
                part.at("type"),
                "unsupported_value",
            )
        texts.append(part.require("refusal" if kind == "refusal" else "text", "a string"))
    return "\n".join(texts)


def _read_call(call: Fields) -> dict[str, Any]:
    """Return a call of an earlier turn; arguments are JSON text, which templates write as it is."""
    call.choice("type", ("function",))
    call.require("function", "an object")
    function = call.object("function")
    name, arguments = function.require("name", "a string"), function.get("arguments", default="")
    return {
        "id": call.get("id", "a string"),
        "type": "function",
        "function": {"name": name, "arguments": arguments or "{}"},
    }


class AnswerMessage:
    """The events of one answer, gathered."""

    def __init__(self):
        self.reasoning: str | None = None
        self.content: str | None = None
        self.calls: list[dict[str, Any]] = []

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning = (self.reasoning or "") + text
                case Content(text):
                    self.content = (self.content or "") + text
                case ToolCallStart(_, call_id, name):
                    self.calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}})
                case ToolCallArguments(index, text):
                    self.calls[index]["function"]["arguments"] += text

    @property
    def chat(self) -> dict[str, Any]:
        """Give chat's form; like OpenAI's, it has no content beside calls rather than an empty one."""
        content = self.content if self.calls else self.content or ""
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def finish_reason(reason: str, calls: int) -> str:
    """Return chat's reason for the engine's, "stop" or "length": an answer that ends with its calls says so."""
    return "tool_calls" if calls and reason == "stop" else reason


@dataclasses.dataclass(frozen=True)
class ChatAnswer:
    """Build what goes back to one request: the completion, or the chunks of its stream.

    Attributes:
      id: of the completion, such as chatcmpl-123.
      created: Unix time in seconds.
    """

    id: str
    model: str
    created: int
    include_usage: bool = False

    def choice(
        self,
        index: int,
        message: AnswerMessage,
        reason: str,
        logprobs: Sequence[dict[str, Any]] | None = None,
        routing: Any = None,
    ) -> dict[str, Any]:
        """Return one whole answer; `reason` is the engine's."""
        choice = {"index": index, "message": message.chat, "logprobs": _logprobs(logprobs)}
        choice["finish_reason"] = finish_reason(reason, len(message.calls))
        return choice if routing is None else choice | {"routing": routing}

    def completion(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return self._head("chat.completion") | {"choices": list(choices), "usage": usage.chat}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the chunk that opens an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(
        self, index: int, events: Iterable[Event], logprobs: Sequence[dict[str, Any]] | None = None, routing: Any = None
    ) -> dict[str, Any] | None:
        """Return the chunk of what has become certain of an answer, or None if there is nothing to tell."""
        message, calls = AnswerMessage(), {}
        for event in events:
            match event:
                case ToolCallStart(call, call_id, name):
                    function = {"name": name, "arguments": ""}
                    calls[call] = {"index": call, "id": call_id, "type": "function", "function": function}
                case ToolCallArguments(call, text):
                    delta = calls.setdefault(call, {"index": call, "function": {"arguments": ""}})
                    delta["function"]["arguments"] += text
                case _:
                    message.add((event,))
        deltas = {"reasoning_content": message.reasoning, "content": message.content}
        delta = {name: text for name, text in deltas.items() if text is not None}
        if calls:
            delta["tool_calls"] = list(calls.values())
        if not delta and not logprobs and routing is None:
            return None
        return self._chunk(index, delta, logprobs=logprobs, routing=routing)

    def last_chunk(self, index: int, reason: str, calls: int) -> dict[str, Any]:
        """Return the chunk that ends an answer; `reason` is the engine's, `calls` how many calls it had."""
        return self._chunk(index, {}, finish_reason(reason, calls))

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk that ends a stream for which include_usage was asked."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage.chat}

    def _chunk(self, index, delta, reason=None, logprobs=None, routing=None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": _logprobs(logprobs), "finish_reason": reason}
        if routing is not None:
            choice["routing"] = routing
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _logprobs(content: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    return None if content is None else {"content": list(content), "refusal": None}
