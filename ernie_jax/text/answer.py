"""The model's text, as it arrives, divided into reasoning, content and tool calls.

A whole answer of the Thinking models, whose template has already opened <think>:

    {reasoning}\\n</think>\\n\\n<response>\\n{content}\\n</response>\\n\\n\\n<tool_call>\\n{call}\\n</tool_call>\\n

with or without a response and with any number of calls. The tags take line breaks with them: </think> and </response>
the one before and all behind, <response> and </tool_call> all behind, <tool_call> all before. Text that stands between
tags where the format has none is content all the same, on a line of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ernie_jax.text import tool_calls
from ernie_jax.text.chat import ChatTemplate
from ernie_jax.text.stop import overlap
from ernie_jax.text.tokenizer import Tokenizer
from ernie_jax.text.tool_calls import MalformedCall, ToolCallReader

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<response>", "</response>"
TAGS = (THINK_OPEN, THINK_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE, tool_calls.OPEN, tool_calls.CLOSE)


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """A piece of the reasoning."""

    text: str


@dataclasses.dataclass(frozen=True)
class Content:
    """A piece of what the user sees."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallStart:
    """A call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True)
class ToolCallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Reasoning | Content | ToolCallStart | ToolCallArguments


@dataclasses.dataclass(frozen=True)
class AnswerFormat:
    """Say which tags an answer can have.

    Attributes:
      thinking: the answer begins inside the reasoning.
      response_tags: content may stand in <response>; the line breaks around it are no content.
      tool_calls: look for calls. Without, <tool_call> is text like any other (`tool_choice` none).
      parallel: whether there may be several calls; if not, the answer is over after the first.
      whole_calls: give a call only once it is complete, and as content if its arguments are no JSON. Otherwise its
        arguments are given as they come, also broken ones, as OpenAI does.
    """

    thinking: bool = False
    response_tags: bool = False
    tool_calls: bool = False
    parallel: bool = True
    whole_calls: bool = False

    @classmethod
    def of(cls, template: ChatTemplate, prompt: str) -> AnswerFormat:
        """Return what a template's models write behind a prompt that it rendered."""
        return cls(
            thinking=prompt.rstrip().endswith(THINK_OPEN),
            response_tags=template.mentions(RESPONSE_OPEN),
            tool_calls=template.mentions(tool_calls.OPEN),
        )


def write_answer(form: AnswerFormat, message: Mapping[str, Any]) -> str:
    """Return what a model says to give an assistant's message: that which AnswerParser takes apart.

    Args:
      message: OpenAI's, with `reasoning_content`, `content` and `tool_calls`, each of which may be missing. A call's
        arguments are JSON text or the object itself.
    """
    parts = []
    if form.thinking:
        parts.append(f"{message.get('reasoning_content') or ''}\n{THINK_CLOSE}\n")
    if content := message.get("content"):
        parts.append(f"\n{RESPONSE_OPEN}\n{content}\n{RESPONSE_CLOSE}\n" if form.response_tags else content)
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        name, arguments = json.dumps(function["name"], ensure_ascii=False), function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        text = f'{{"name": {name}, "arguments": {arguments}}}'
        parts.append(f"\n\n{tool_calls.OPEN}\n{text}\n{tool_calls.CLOSE}\n")
    return "".join(parts)


def tag_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that are a tag, which a detokenizer before a parser has to keep, special or not."""
    return frozenset(index for tag in TAGS if (index := tokenizer.token_id(tag)) is not None)


def new_call_id() -> str:
    """Return a fresh id in OpenAI's form."""
    return f"call_{uuid.uuid4().hex[:24]}"


class AnswerParser:
    """Divide an answer into events as soon as they are certain.

    The texts of the events, joined by kind and call, are the same however the answer is cut into pieces. Held back are
    only an end that may be the beginning of a tag with the line breaks before it, and a call until its name and the
    start of its arguments are there (`whole_calls`: all of it). What proves to be no call is content, with its tags.

    Attributes:
      in_reasoning: whether the next text belongs to the reasoning.
      over: whether nothing more can come, as parallel calls are not wanted and there was a call.
      calls: how many calls there were.
    """

    def __init__(self, form: AnswerFormat, new_id: Callable[[], str] = new_call_id):
        self.in_reasoning = form.thinking
        self.over = False
        self.calls = 0
        self._form = form
        self._new_id = new_id
        self._text = ""  # not yet certain
        self._events: list[Event] = []
        self._reasoned = False
        self._blank = True  # since the start or the last tag
        self._said = False  # whether there is content
        self._behind_tag = False  # whether line breaks at the start of the text go with the tag before
        self._broken_line = False  # whether a tag took line breaks that stood between two texts
        self._reader: ToolCallReader | None = None
        self._raw: list[str] = []  # the call as it stands, should it prove to be none
        self._lines = ""  # the line breaks before the call
        self._own_tags = (RESPONSE_OPEN, RESPONSE_CLOSE) * form.response_tags + (tool_calls.OPEN,) * form.tool_calls
        self._tags = self._own_tags

    def feed(self, text: str) -> list[Event]:
        """Take the next text; return what is certain now."""
        self._text += text
        while not self.over and self._advance():
            pass
        return self._take_events()

    def finish(self, truncated: bool = True) -> list[Event]:
        """End the stream; return what was held back and is text after all.

        Args:
          truncated: whether the model had more to say (it met the length limit or a stop string). Then the beginning
            of a tag at the end is taken for one and dropped, as is a call without a name; else both are text.
        """
        if self.over:
            return []
        self._finish_call(truncated)
        if not self.over:
            self._finish_text(truncated)
        self._text, self.over = "", True
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _advance(self) -> bool:
        """Go on to the next tag; tell whether it was there."""
        if self._reader:
            return self._advance_call()
        return self._advance_reasoning() if self.in_reasoning else self._advance_content()

    # Reasoning

    def _advance_reasoning(self) -> bool:
        if not self._reasoned and not self._begin_reasoning():
            return False
        before, tag, behind = self._text.partition(THINK_CLOSE)
        if tag:
            self._reason(before.removesuffix("\n"))
            self._text, self.in_reasoning, self._behind_tag = behind, False, True
            return True
        certain = len(before) - max(overlap(before, "\n" + THINK_CLOSE), overlap(before, THINK_CLOSE))
        self._reason(before[:certain])
        self._text = before[certain:]
        return False

    def _begin_reasoning(self) -> bool:
        """Skip <think>, should the model have written it again, and the line breaks around; tell if that is done."""
        self._text = self._text.lstrip("\n")
        while self._text.startswith(THINK_OPEN):
            self._text = self._text[len(THINK_OPEN) :].lstrip("\n")
        return not THINK_OPEN.startswith(self._text)

    def _reason(self, text: str) -> None:
        if text:
            self._reasoned = True
            self._events.append(Reasoning(text))

    # Content

    def _advance_content(self) -> bool:
        if not self._tags:
            self._say(self._text)
            self._text = ""
            return False
        found = re.search("|".join(self._tags), self._text)
        if not found:
            certain = len(self._text) - _partial(self._text, self._tags)
            certain = len(self._text[:certain].rstrip("\n"))
            if not self._blank or self._text[:certain].strip():
                self._say(self._text[:certain])
                self._text = self._text[certain:]
            return False
        before, tag = self._text[: found.start()], found[0]
        self._text = self._text[found.end() :]
        text = before.rstrip("\n")
        lines = before[len(text) :]
        if tag == RESPONSE_CLOSE:
            text, lines = text + lines[:-1], lines[-1:]
        if not self._blank or text.strip():
            self._say(text)
        else:
            lines = before
        if tag == tool_calls.OPEN:
            self._reader, self._lines = ToolCallReader(self._form.whole_calls), lines
            self._raw = [lines + tag]
            self._tags = self._own_tags
        else:
            self._pass_tag(lines)
            if tag == tool_calls.CLOSE:
                self._tags = self._own_tags
        return True

    def _pass_tag(self, lines: str) -> None:
        """Remember that a tag took `lines` before it and takes those behind it."""
        self._broken_line |= "\n" in lines
        self._blank = self._behind_tag = True

    def _say(self, text: str) -> None:
        """Give out content that is not blank if it is the first since a tag."""
        if self._blank and self._behind_tag:
            lines = len(text) - len(text.lstrip("\n"))
            self._broken_line |= lines > 0
            text = text[lines:]
        if not text:
            return
        if self._broken_line and self._said:
            text = "\n" + text
        self._said, self._blank, self._behind_tag, self._broken_line = True, False, False, False
        self._events.append(Content(text))

    def _finish_text(self, truncated: bool) -> None:
        """Give out the text that is left, without what belongs to a tag."""
        tags = (THINK_OPEN, THINK_CLOSE) if self.in_reasoning else self._tags
        partial = _partial(self._text, tags)
        text = self._text
        if partial and truncated:
            text = text[:-partial].rstrip("\n")
        elif not partial and (self.in_reasoning or self._form.response_tags):
            text = text.rstrip("\n")
        if self.in_reasoning:
            self._reason(text)
        elif not self._behind_tag or text.strip():
            self._say(text)

    # Tool calls

    def _advance_call(self) -> bool:
        text, self._text = self._text, ""
        if self._reader.name is None:
            self._raw.append(text)
        try:
            self._show_call(self._reader.feed(text))
        except MalformedCall:
            self._take_back_call()
            return True
        if self._reader.over:
            self._text = self._reader.rest
            self._end_call()
            return True
        return False

    def _show_call(self, arguments: str) -> None:
        """Give out the next of a call's arguments, and its start before the first."""
        if self._raw and self._reader.name is not None:
            self._raw = []
            self._events.append(ToolCallStart(self.calls, self._new_id(), self._reader.name))
            self.calls += 1
        if arguments:
            self._events.append(ToolCallArguments(self.calls - 1, arguments))

    def _take_back_call(self) -> None:
        """Make what is no call content: its tag at once, and what follows once it was searched for tags."""
        tag, *text = self._raw
        self._reader, self._raw, self._text = None, [], "".join(text)
        self._say(tag)

    def _end_call(self) -> None:
        # A call without </tool_call> may be followed by text and then the tag, which belongs to no text.
        self._tags = self._own_tags + (tool_calls.CLOSE,) * (not self._reader.closed)
        self._reader = None
        self._pass_tag(self._lines)
        self.over = not self._form.parallel

    def _finish_call(self, truncated: bool) -> None:
        while self._reader:
            try:
                self._show_call(self._reader.finish(truncated))
                self._reader = None
            except MalformedCall:
                if truncated:
                    self._reader = None
                    return
                self._take_back_call()
                while not self.over and self._advance():
                    pass


def _partial(text: str, tags: Sequence[str]) -> int:
    """Return the length of the end of a text that may be the beginning of a tag."""
    return max((overlap(text, tag) for tag in tags), default=0)
