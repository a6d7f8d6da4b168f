"""/v1/responses in its basic form: nothing is stored, functions are the only tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ernie_jax.engine.sampling import MAX_TOP_LOGPROBS, SamplingParams
from ernie_jax.server.protocol.chat import EFFORTS, Conversation, read_content, read_message
from ernie_jax.server.protocol.errors import ApiError
from ernie_jax.server.protocol.fields import Fields
from ernie_jax.server.protocol.generation import Generation, Usage, read_format, read_generation
from ernie_jax.server.protocol.tools import read_tools
from ernie_jax.text.answer import Content, Event, Reasoning, ToolCallArguments, ToolCallStart

_REFUSED = {
    "previous_response_id": "this server stores no responses; send the whole conversation as 'input'",
    "conversation": "this server stores no conversations; send the whole conversation as 'input'",
    "background": "this server stores no responses; stream them",
    "prompt": "this server stores no prompts; send 'instructions' and 'input'",
    "max_tool_calls": "this server runs no tools",
    "moderation": "this server does not moderate",
}
_INCLUDE_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_INCLUDE_LOGPROBS, "reasoning.encrypted_content")
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")


@dataclasses.dataclass(frozen=True)
class ResponsesRequest:
    """A request of /v1/responses; `echo` are the fields of it that the response repeats."""

    model: str | None
    conversation: Conversation
    generation: Generation
    echo: dict[str, Any]

    @classmethod
    def parse(cls, fields: Fields, defaults: SamplingParams) -> ResponsesRequest:
        """Read a request; `defaults` are the model's recommended settings.

        Raises:
          ApiError: naming the field.
        """
        fields.refuse(_REFUSED)
        fields.neutral({"truncation": ("disabled",), "n": (1,)})
        include = fields.strings("include")
        if unknown := [name for name in include if name not in _INCLUDABLE]:
            raise fields.invalid("include", f"'{unknown[0]}'; supported values are {', '.join(map(repr, _INCLUDABLE))}")
        top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS, 0)
        tools = read_tools(fields, nested=False)
        generation = read_generation(
            fields, defaults, ("max_output_tokens",), logprobs=top if top or _INCLUDE_LOGPROBS in include else None
        )

        constraint, text = None, fields.object("text")
        if text:
            form = text.object("format")
            constraint = read_format(form) if form else None
            text.ignore(("verbosity",))
            text.done()
        effort, reasoning = "high", fields.object("reasoning")
        if reasoning:
            effort = reasoning.choice("effort", EFFORTS, effort)
            reasoning.ignore(("summary", "generate_summary", "context", "mode"))
            reasoning.done()
        budget = fields.integer("reasoning_max_tokens", 0, 2**31 - 1, EFFORTS[effort])

        instructions = fields.get("instructions", "a string")
        messages = [{"role": "system", "content": instructions}] if instructions else []
        messages += _read_input(fields)
        sampling = generation.sampling
        echo = {
            "instructions": instructions,
            "max_output_tokens": generation.max_tokens,
            "metadata": fields.get("metadata", "an object", {}),
            "parallel_tool_calls": fields.get("parallel_tool_calls", "a boolean", True),
            "reasoning": {"effort": fields.get("reasoning", default={}).get("effort"), "summary": None},
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}} | {k: v for k, v in fields.get("text", default={}).items() if v},
            "tool_choice": tools.given[1],
            "tools": tools.given[0],
            "top_logprobs": top,
            "top_p": sampling.top_p,
            "user": fields.get("user", "a string"),
        }
        request = cls(
            fields.get("model", "a string"), Conversation(messages, tools, constraint, budget), generation, echo
        )
        fields.done()
        return request


def _read_input(fields: Fields) -> list[dict[str, Any]]:
    """Return the messages that the input stands for: items of one turn of the assistant become one message."""
    if isinstance(fields.require("input"), str):
        return [{"role": "user", "content": fields.get("input")}]
    messages: list[dict[str, Any]] = []
    thoughts: str | None = None
    for item in fields.objects("input"):
        match item.get("type", "a string", "message"):
            case "message":
                messages.append(_read_message(item))
            case "reasoning":
                parts = [*item.objects("content")] or [*item.objects("summary")]
                thoughts = "\n".join(part.require("text", "a string") for part in parts)
                continue
            case "function_call":
                function = {"name": item.require("name", "a string"), "arguments": item.get("arguments") or "{}"}
                call = {"id": item.require("call_id", "a string"), "type": "function", "function": function}
                if thoughts is not None or not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = read_content(item, _TEXT_PARTS, "output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output or ""})
            case kind:
                raise ApiError(
                    f"'{item.path}' is an item of type '{kind}', which is not supported.",
                    item.at("type"),
                    "unsupported_value",
                )
        if thoughts and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thoughts
        thoughts = None
    if not messages:
        raise fields.invalid("input", "it must have at least one message")
    return messages


def _read_message(item: Fields) -> dict[str, Any]:
    """Return a message, whose parts are named otherwise than in chat."""
    content = read_content(item, _TEXT_PARTS)
    item.ignore(("id", "status", "phase"))
    return read_message(Fields({"role": item.require("role"), "content": content}, item.path))


class ResponseAnswer:
    """Build the response to one request, step by step, and the events of its stream.

    Each method returns events, each an object with a type; without a stream they are not needed, only `body` is.

    Attributes:
      id: of the response, such as resp_123.
      created: Unix time in seconds.
    """

    def __init__(self, request: ResponsesRequest, id: str, model: str, created: int):
        self.body: dict[str, Any] = {
            "id": id,
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **request.echo,
        }
        self._id = id.partition("_")[2]
        self._sequence = 0
        self._item: dict[str, Any] | None = None  # the last item, while it is open

    def start(self) -> list[dict[str, Any]]:
        """Open the stream."""
        return [self._event(f"response.{kind}", response=self._snapshot()) for kind in ("created", "in_progress")]

    def add(self, events: Iterable[Event], logprobs: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Take what has become certain; log-probabilities are kept with content only."""
        sent: list[dict[str, Any]] = []
        for event in events:
            match event:
                case Reasoning(text):
                    part = {"type": "reasoning_text", "text": ""}
                    sent += self._open("reasoning", "rs", part, summary=[])
                    sent.append(self._delta("response.reasoning_text", text))
                case Content(text):
                    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                    sent += self._open("message", "msg", part, role="assistant")
                    sent.append(self._delta("response.output_text", text, list(logprobs)))
                    logprobs = ()
                case ToolCallStart(_, call_id, name):
                    sent += self._close()
                    sent += self._open("function_call", "fc", None, call_id=call_id, name=name, arguments="")
                case ToolCallArguments(_, text):
                    self._item["arguments"] += text
                    sent.append(self._of_item("response.function_call_arguments.delta", delta=text))
        return sent

    def finish(self, reason: str, usage: Usage, routing: Any = None) -> list[dict[str, Any]]:
        """End the response; `reason` is the engine's, "stop" or "length"."""
        status = "incomplete" if reason == "length" else "completed"
        sent = self._close(status)
        if routing is not None:
            self.body["routing"] = routing
        self.body |= {"status": status, "usage": usage.responses}
        if status == "incomplete":
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*sent, self._event(f"response.{status}", response=self._snapshot())]

    def fail(self, error: ApiError) -> list[dict[str, Any]]:
        """End a stream that can't go on."""
        code = (
            "rate_limit_exceeded" if error.status == 429 else "invalid_prompt" if error.status < 500 else "server_error"
        )
        self.body |= {"status": "failed", "error": {"code": code, "message": str(error)}}
        return [self._event("response.failed", response=self._snapshot())]

    def _open(self, kind: str, prefix: str, part: dict[str, Any] | None, **members: Any) -> list[dict[str, Any]]:
        """Begin an item, and its one part, unless the open item is of this kind."""
        if self._item and self._item["type"] == kind:
            return []
        sent, output = self._close(), self.body["output"]
        item_id = f"{prefix}_{self._id}_{len(output)}"
        self._item = {"id": item_id, "type": kind, "status": "in_progress", **members}
        if part:
            self._item["content"] = []
        output.append(self._item)
        sent.append(self._of_output("response.output_item.added"))
        if part:
            sent.append(self._of_item("response.content_part.added", content_index=0, part=dict(part)))
            self._item["content"].append(part)
        return sent

    def _delta(self, kind: str, text: str, logprobs: list | None = None) -> dict[str, Any]:
        """Add text to the open item's part."""
        part = self._item["content"][0]
        part["text"] += text
        details = {} if logprobs is None else {"logprobs": logprobs}
        part.get("logprobs", []).extend(logprobs or ())
        return self._of_item(f"{kind}.delta", content_index=0, delta=text, **details)

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        """End the open item, if there is one."""
        if not self._item:
            return []
        sent, item = [], self._item
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            sent.append(self._of_item("response.function_call_arguments.done", **done))
        else:
            [part] = item["content"]
            details = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            done = f"response.{part['type']}.done"
            sent.append(self._of_item(done, content_index=0, text=part["text"], **details))
            sent.append(self._of_item("response.content_part.done", content_index=0, part=dict(part)))
        item["status"] = status
        sent.append(self._of_output("response.output_item.done"))
        self._item = None
        return sent

    def _of_output(self, kind: str) -> dict[str, Any]:
        """Return an event with the open item as it is now."""
        item = {name: list(value) if isinstance(value, list) else value for name, value in self._item.items()}
        return self._event(kind, output_index=len(self.body["output"]) - 1, item=item)

    def _of_item(self, kind: str, **members: Any) -> dict[str, Any]:
        """Return an event about the open item."""
        return self._event(kind, item_id=self._item["id"], output_index=len(self.body["output"]) - 1, **members)

    def _event(self, kind: str, **members: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._sequence, **members}
        self._sequence += 1
        return event

    def _snapshot(self) -> dict[str, Any]:
        return self.body | {"output": list(self.body["output"])}
