"""One tool call in the model's text, read as it arrives: a JSON object between <tool_call> and </tool_call>."""

from __future__ import annotations

import json
import re

from ernie_jax.text.stop import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# Longer keys, names and scalars are no call; a bound, since nothing is shown before they end.
_LONGEST_WORD = 256

_BLANK = re.compile(r"\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SCALAR = re.compile(r"[-+.\w]+(?=[\s,}])")
_INSIDE_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_OUTSIDE_STRING = re.compile(r"[\s0-9+\-.,:Eaeflnrstu]+")
_CLOSED_BY = {"{": "}", "[": "]"}


class MalformedCall(Exception):
    """Say that the text is no tool call."""


class ToolCallReader:
    """Read one call from the text behind <tool_call>, however it is cut into pieces.

    The members may come in any order and others are skipped; without arguments they are {}. The arguments are passed on
    as the model wrote them, except that a control character inside a string is escaped, as JSON wants it. Only brackets
    and strings are followed, so that `}</tool_call>` inside a string ends nothing. Surplus and missing closing braces
    are forgiven once the arguments are complete.

    Args:
      whole: give nothing before the arguments are complete, and refuse arguments that are no JSON. Otherwise they are
        passed on at once, and what turns out to be no JSON is passed on too, up to </tool_call>: a client that has seen
        the beginning of a call can't be told to forget it.

    Attributes:
      name: the function, once the call may be shown.
      over: whether the call has ended.
      rest: the text behind the call.
      closed: whether the call ended with </tool_call>.
    """

    def __init__(self, whole: bool):
        self.name: str | None = None
        self.over = self.closed = False
        self.rest = ""
        self._whole = whole
        self._text = ""  # not yet understood
        self._next = self._open
        self._key: str | None = None
        self._called: str | None = None
        self._value: _Value | None = None
        self._arguments: list[str] | None = None  # read, but not yet given out
        self._complete = False

    def feed(self, text: str) -> str:
        """Take the next text; return the text of the arguments that can be shown now.

        Raises:
          MalformedCall: if this is no call; never after `name` is set.
        """
        self._text += text
        try:
            while not self.over and self._next():
                pass
        except MalformedCall:
            if not self._complete or self._called is None:
                raise
            self.over = True  # what stands behind the arguments spoils no call
        if self.over:
            self.rest, self._text = self._text, ""
        return self._take()

    def finish(self, truncated: bool) -> str:
        """End the stream within the call; return what was held back of its arguments.

        Args:
          truncated: whether the model had more to say: what there is of the arguments is then shown all the same.

        Raises:
          MalformedCall: if nothing of the call has been shown, and nothing can be.
        """
        if self.name is None and (self._called is None or not truncated):
            raise MalformedCall
        self._whole = False
        if self._next == self._broken_text and not truncated:
            self._arguments.append(self._text)
        if self._arguments is None:
            self._arguments = []
        return self._take()

    def _take(self) -> str:
        """Return what can be shown of the arguments, and set `name` with the first of it."""
        if self._called is None or self._arguments is None or (self._whole and not self._complete):
            return ""
        self.name = self._called
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    # Each of these reads one part of the call and says whether it got to its end; if not, more text is needed.

    def _open(self) -> bool:
        return self._expect("{", self._read_key)

    def _read_key(self) -> bool:
        self._skip_blank()
        if self._text.startswith("}"):  # no member at all, or a comma too many
            return self._end_object()
        word = self._word(_STRING)
        if word is None:
            return False
        self._key, self._next = word, self._colon
        return True

    def _colon(self) -> bool:
        return self._expect(":", self._read_value)

    def _read_value(self) -> bool:
        self._skip_blank()
        if not self._text:
            return False
        if self._key == "name" and self._called is None:
            word = self._word(_STRING)
            if word is None:
                return False
            self._called, self._next = word, self._separator
            if not word:
                raise MalformedCall
            return True
        wanted = self._key == "arguments" and self._arguments is None
        if self._text[0] in '{["':
            if wanted and self._text[0] != "{":
                raise MalformedCall
            self._value = _Value()
            if wanted:
                self._arguments = []
            self._next = self._arguments_text if wanted else self._other_text
            return True
        word = self._word(_SCALAR)
        if word is None:
            return False
        if wanted and word != "null":
            raise MalformedCall
        self._next = self._separator
        return True

    def _arguments_text(self) -> bool:
        shown, self._text = self._value.feed(self._text)
        self._arguments.append(shown)
        if self._value.broken:
            if self._whole or self._called is None:
                raise MalformedCall
            self._next = self._broken_text
            return True
        if not self._value.over:
            return False
        if self._whole:
            _check_json("".join(self._arguments))
        self._complete, self._next = True, self._separator
        return True

    def _other_text(self) -> bool:
        _, self._text = self._value.feed(self._text)
        if self._value.broken:
            raise MalformedCall
        self._next = self._separator if self._value.over else self._other_text
        return self._value.over

    def _broken_text(self) -> bool:
        """Pass on what is no JSON up to the tag."""
        shown, tag, rest = self._text.partition(CLOSE)
        if not tag:
            certain = len(shown) - overlap(shown, CLOSE)
            shown, rest = shown[:certain], shown[certain:]
        self._arguments.append(shown)
        self._text = rest
        self.over = self.closed = bool(tag)
        return False

    def _separator(self) -> bool:
        self._skip_blank()
        if self._text.startswith(","):
            self._text, self._next = self._text[1:], self._read_key
            return True
        if self._text and not self._text.startswith("}") and not self._complete:
            raise MalformedCall
        return bool(self._text) and self._end_object()

    def _end_object(self) -> bool:
        if self._called is None:
            raise MalformedCall
        if self._arguments is None:
            self._arguments = ["{}"]
        self._complete, self._next = True, self._tail
        return True

    def _tail(self) -> bool:
        self._text = self._text.lstrip("} \t\r\n")
        if self._text.startswith(CLOSE):
            self._text = self._text[len(CLOSE) :]
            self.over = self.closed = True
        elif not CLOSE.startswith(self._text):
            self.over = True
        return False

    def _expect(self, character: str, then) -> bool:
        self._skip_blank()
        if not self._text:
            return False
        if self._text[0] != character:
            raise MalformedCall
        self._text, self._next = self._text[1:], then
        return True

    def _word(self, pattern: re.Pattern) -> str | None:
        """Take a short string or scalar from the start of the text, or None if it may still be incomplete."""
        if match := pattern.match(self._text):
            self._text = self._text[match.end() :]
            if match.end() > _LONGEST_WORD:
                raise MalformedCall
            return _check_json(match[0]) if pattern is _STRING else match[0]
        fits = not self._text or (self._text[0] == '"') == (pattern is _STRING)
        if not fits or len(self._text) > _LONGEST_WORD:
            raise MalformedCall
        if pattern is _SCALAR and self._text and not re.fullmatch(r"[-+.\w]+", self._text):
            raise MalformedCall
        return None

    def _skip_blank(self) -> None:
        self._text = self._text[_BLANK.match(self._text).end() :]


class _Value:
    """Follow one JSON object, array or string to its end, by its brackets and quotes alone.

    Attributes:
      over: whether the end was found.
      broken: whether a character came that JSON does not have there.
    """

    def __init__(self):
        self.over = self.broken = False
        self._closers: list[str] = []
        self._in_string = self._escaped = False

    def feed(self, text: str) -> tuple[str, str]:
        """Take the next text; return what belongs to the value, with control characters escaped, and what is behind."""
        shown, at = [], 0
        while at < len(text) and not self.over:
            run = (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).match(text, at)
            if run and not self._escaped:
                shown.append(run[0])
                at = run.end()
                continue
            shown.append(self._step(text[at]))
            if self.broken:
                break
            at += 1
        return "".join(shown), text[at:]

    def _step(self, character: str) -> str:
        if self._in_string:
            was_escaped = self._escaped
            self._escaped = character == "\\" and not was_escaped
            if character < " ":
                return json.dumps(character)[1 + was_escaped : -1]
            if character == '"' and not was_escaped:
                self._in_string = False
                self.over = not self._closers
        elif character == '"':
            self._in_string = True
        elif character in _CLOSED_BY:
            self._closers.append(_CLOSED_BY[character])
        elif self._closers and character == self._closers[-1]:
            self._closers.pop()
            self.over = not self._closers
        else:
            self.broken = True
            return ""
        return character


def _check_json(text: str):
    """Return the value of a JSON text, in which strings may have control characters."""
    try:
        return json.loads(text, strict=False)
    except ValueError:
        raise MalformedCall from None
