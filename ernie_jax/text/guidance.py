"""Guided output: which tokens may come next, so that an answer is JSON, matches a regex or grammar, or calls tools.

The automata are llguidance's, which work on the host. A `Grammar` is stepped token by token:

    grammar.mask(row)        # int32 [ceil(V / 32)], bit i of the row is token i
    grammar.accept(token)
    grammar.finished
"""

from __future__ import annotations

import abc
import collections
import copy
import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from ernie_jax.errors import UserError
from ernie_jax.text import answer, tool_calls
from ernie_jax.text.answer import AnswerFormat
from ernie_jax.text.tokenizer import Tokenizer

# Placeholders such as <|LOC_7|> are markers whether or not a tokenizer's files call them special.
_MARKER = re.compile(rb"<\|.*\|>", re.DOTALL)

# Free enough for how models write JSON, but no endless white space: a space, or a line break and an indentation.
_JSON_LAYOUT = {"whitespace_pattern": "( |\\n {0,16})"}
# Arguments as the chat template writes them into the next turn.
_ARGUMENTS_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclasses.dataclass(frozen=True)
class TextConstraint:
    """Say what the content of an answer must be.

    Attributes:
      kind: what `value` is: nothing, a JSON schema, a regex (Rust's syntax, the whole text matches), a grammar (Lark as
        llguidance reads it, or GBNF), or a list of texts.
      field: the request's field that holds the value, for error sentences.
      strict: refuse a schema with keywords that can't be enforced; otherwise they are ignored.
    """

    kind: Literal["json_object", "json_schema", "regex", "grammar", "choice"]
    value: Any = None
    field: str = "response_format"
    strict: bool = True


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that may be called; `parameters` is the JSON schema of its arguments, None for no arguments."""

    name: str
    parameters: Mapping[str, Any] | None = None
    field: str = "tools"
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class ToolConstraint:
    """Say which calls an answer may have.

    Attributes:
      required: nothing but calls, at least one. Otherwise text is free, and a call that the model begins must be one.
      parallel: allow several calls.
    """

    functions: tuple[Function, ...]
    required: bool
    parallel: bool = True


class Grammar(abc.ABC):
    """Say which tokens may continue one answer.

    Attributes:
      free: whether every token may come next, so that no mask is needed.
      finished: whether the answer is complete and nothing more may come.
    """

    free: bool = False
    finished: bool = False

    @abc.abstractmethod
    def mask(self, out: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, and clear all others.

        An id that no token of the tokenizer has is never set. The GIL is released meanwhile.

        Args:
          out: contiguous int32 [ceil(V / 32)].

        Raises:
          UserError: if the grammar is too complex to go on.
        """

    @abc.abstractmethod
    def accept(self, token: int) -> bool:
        """Go on by a token; False, and nothing changes, if it may not come next."""

    @abc.abstractmethod
    def copy(self) -> Grammar:
        """Return an independent grammar in the same state."""


class Guidance:
    """Make grammars for one tokenizer; costs as much as reading the vocabulary, so make one and keep it.

    Args:
      vocab_size: V, the width of the model's logits.
      stop_ids: ids that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int]):
        if vocab_size < tokenizer.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {vocab_size}")
        self._tokenizer = tokenizer
        self._tags = {tag: tokenizer.token_id(tag) for tag in answer.TAGS}
        words = _Words(tokenizer, vocab_size, stop_ids, set(self._tags.values()))
        self._words = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=sorted(stop_ids))
        self._all = _bits([i for i in range(tokenizer.vocab_size) if tokenizer.piece_bytes(i)], vocab_size)
        self._going_on = self._all & ~_bits(stop_ids, vocab_size)

    def grammar(
        self,
        form: AnswerFormat,
        text: TextConstraint | None = None,
        tools: ToolConstraint | None = None,
        reasoning_budget: int | None = None,
    ) -> Grammar | None:
        """Return the grammar of answers in a format, in its first state, or None if any answer will do.

        An answer that begins inside its reasoning is constrained from </think> on. With a text constraint, tools that
        are not required may be called in place of the text. Calls that are neither required nor constrained by a text
        constraint are guided from the token <tool_call> on, where the tokenizer has it.

        Args:
          reasoning_budget: after this many tokens of reasoning </think> is forced.

        Raises:
          UserError: naming the field, if a constraint is broken or can't be enforced.
        """
        for function in tools.functions if tools else ():
            self._check_schema(_arguments_schema(function), f"{function.field}.parameters")
        grammar = None
        if tools and tools.required:
            grammar = self._match("\n".join(["start: calls", *self._calls(tools)]), "tools")
        elif text:
            grammar = self._text_grammar(form, text, tools)
        elif tools and self._tags[tool_calls.OPEN] is not None:
            body = self._match("\n".join(["start: body", *self._call_body(tools)]), "tools")
            grammar = _CallsOnDemand(body, self._tags[tool_calls.OPEN], tools.parallel, self._all)
        if form.thinking and (grammar or reasoning_budget is not None):
            grammar = self._behind_reasoning(grammar, reasoning_budget)
        return grammar

    def _behind_reasoning(self, grammar: Grammar | None, budget: int | None) -> Grammar:
        close = self._tags[answer.THINK_CLOSE]
        if close is None:
            raise UserError(
                "this model's tokenizer has no token </think>, which guided output and reasoning_max_tokens need"
            )
        # The model may end within its reasoning only if nothing is asked of what follows.
        allowed = self._all if grammar is None or grammar.free else self._going_on
        return _BehindReasoning(grammar, budget, close, self._tokenizer, allowed)

    def _match(self, lark: str, field: str, inner: str | None = None) -> Grammar:
        """Compile a grammar, in which @inner stands for another."""
        grammars = [{"name": "outer", "lark_grammar": lark}]
        if inner is not None:
            grammars.append({"name": "inner", "lark_grammar": inner})
        matcher = llguidance.LLMatcher(self._words, json.dumps({"grammars": grammars}), log_level=0)
        if matcher.is_error():
            raise UserError(f"{field}: {_sentence(matcher.get_error())}")
        return _Match(matcher)

    def _check_schema(self, schema: Mapping[str, Any], field: str) -> None:
        """Compile a schema alone, so that an error is about it and nothing else."""
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        broken, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._words)
        if broken:
            raise UserError(f"{field}: {_sentence(messages[0])}")

    def _text_grammar(self, form: AnswerFormat, text: TextConstraint, tools: ToolConstraint | None) -> Grammar:
        inner = None
        match text.kind:
            case "json_object":
                body = _json({"type": "object", "x-guidance": _JSON_LAYOUT})
            case "json_schema":
                schema = {**text.value, "x-guidance": _JSON_LAYOUT | {"lenient": not text.strict}}
                self._check_schema(schema, text.field)
                body = _json(schema)
            case "regex":
                if not text.value:
                    raise UserError(f"{text.field}: a regex must not be empty")
                body = f"/{llguidance.regex_to_lark(text.value, 'd')}/"
            case "choice":
                if not all(text.value) or not text.value:
                    raise UserError(f"{text.field}: there must be a choice, and none may be empty")
                body = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in text.value)
            case "grammar":
                body, inner = "@inner", _lark(text.value, text.field)
        self._match(f"start: {body}", text.field, inner)  # alone, so that errors are those of the field
        rules = [f"text: {body}"]
        if form.response_tags:
            opened = f"{_quote('\n\n')} {self._tag(answer.RESPONSE_OPEN)} {_quote('\n')}"
            rules.append(f"content: {opened} text {_quote('\n')} {self._tag(answer.RESPONSE_CLOSE)}")
        else:
            rules.append("content: text")
        rules += self._calls(tools) if tools else ["calls: content"]
        return self._match("\n".join(["start: content | calls", *rules]), text.field, inner)

    def _calls(self, tools: ToolConstraint) -> list[str]:
        """Return rules for one or more calls; line breaks at the end must not ask for another."""
        call = f"BREAKS {self._tag(tool_calls.OPEN)} body"
        calls = f"calls: {call} ({call})* BREAKS" if tools.parallel else f"calls: {call}"
        return [calls, r"BREAKS: /\n{0,3}/", *self._call_body(tools)]

    def _call_body(self, tools: ToolConstraint) -> list[str]:
        """Return rules for what follows <tool_call>, up to and with </tool_call>."""
        names = [f"call_{index}" for index in range(len(tools.functions))]
        rules = [f"body: {_quote('\n')} ({' | '.join(names)}) {_quote('\n')} {self._tag(tool_calls.CLOSE)}"]
        for name, function in zip(names, tools.functions, strict=True):
            begin = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
            rules.append(f"{name}: {_quote(begin)} {_json(_arguments_schema(function))} {_quote('}')}")
        return rules

    def _tag(self, tag: str) -> str:
        """Return a tag in a grammar: its token, or its text where the tokenizer has none."""
        index = self._tags[tag]
        return _quote(tag) if index is None else f"<[{index}]>"


class _Words:
    """The vocabulary in the form that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int], tags: Collection[int | None]):
        self._tokenizer = tokenizer
        self.eos_token_id = min(stop_ids)
        self.tokens = [tokenizer.piece_bytes(i) for i in range(tokenizer.vocab_size)]
        # Of two tokens with the same bytes only one can be allowed: a byte piece is not what the model was trained on.
        counts = collections.Counter(self.tokens)
        for byte in range(256):
            index = tokenizer.token_id(f"<0x{byte:02X}>")
            if index is not None and counts[bytes([byte])] > 1:
                self.tokens[index] = b""
        self.tokens += [b""] * (vocab_size - len(self.tokens))
        self._special = {i for i, word in enumerate(self.tokens) if tokenizer.is_special(i) or _MARKER.fullmatch(word)}
        self._special |= {*tags, *stop_ids} - {None}
        self.special_token_ids = sorted(self._special)
        self._bytes = {word[0]: i for i, word in enumerate(self.tokens) if len(word) == 1}

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text that a grammar forces: its characters, never a special token."""
        if not isinstance(text, str):
            raise TypeError("text only")  # llguidance tries bytes first
        ids = self._tokenizer.encode(text)
        if self._special.isdisjoint(ids) and b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return [self._bytes[byte] for byte in text.encode() if byte in self._bytes]


class _Match(Grammar):
    """Follow one automaton of llguidance's."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self, out: np.ndarray) -> None:
        _check_row(out)
        self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        if self._matcher.is_error():
            raise UserError(f"the grammar is too complex to go on: {_sentence(self._matcher.get_error())}")

    def accept(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1

    def copy(self) -> Grammar:
        return _Match(self._matcher.deep_copy())


class _CallsOnDemand(Grammar):
    """Leave text free and guide what follows the token that opens a call."""

    def __init__(self, body: Grammar, opening: int, parallel: bool, allowed: np.ndarray):
        self._first = body
        self._body: Grammar | None = None
        self._opening = opening
        self._parallel = parallel
        self._allowed = allowed

    @property
    def free(self) -> bool:
        return self._body is None

    def mask(self, out: np.ndarray) -> None:
        if self._body:
            self._body.mask(out)
        else:
            _check_row(out)
            out[:] = self._allowed

    def accept(self, token: int) -> bool:
        if self._body is None:
            if token == self._opening:
                self._body = self._first.copy()
            return True
        if not self._body.accept(token):
            return False
        if self._body.finished:
            self._body, self.finished = None, not self._parallel
        return True

    def copy(self) -> Grammar:
        result = copy.copy(self)
        result._body = self._body and self._body.copy()
        return result


class _BehindReasoning(Grammar):
    """Leave reasoning free for as long as its budget lasts, and let another grammar guide what follows </think>."""

    def __init__(
        self, inner: Grammar | None, budget: int | None, close: int, tokenizer: Tokenizer, allowed: np.ndarray
    ):
        self._inner = inner
        self._left = budget
        self._close = close
        self._tokenizer = tokenizer
        self._allowed = allowed
        self._reasoning = True
        # A line break comes before </think>, if it is one token and the reasoning does not end in one.
        breaks = tokenizer.encode("\n")
        self._break = breaks[0] if len(breaks) == 1 else None
        self._at_break = True  # the template has written one behind <think>

    @property
    def free(self) -> bool:
        if self._reasoning:
            return self._left != 0 and (self._inner is None or self._inner.free)
        return self._inner is None or self._inner.free

    @property
    def finished(self) -> bool:
        return not self._reasoning and self._inner is not None and self._inner.finished

    def _forced(self) -> int | None:
        """Return the token that the spent budget asks for."""
        if self._left != 0:
            return None
        return self._close if self._at_break or self._break is None else self._break

    def mask(self, out: np.ndarray) -> None:
        if not self._reasoning and self._inner:
            return self._inner.mask(out)
        _check_row(out)
        out[:] = self._allowed
        if self._reasoning and (forced := self._forced()) is not None:
            out[:] = 0
            out[forced // 32] = np.uint32(1 << forced % 32).astype(np.int32)

    def accept(self, token: int) -> bool:
        if not self._reasoning:
            return self._inner is None or self._inner.accept(token)
        if (forced := self._forced()) is not None:
            if token != forced:
                return False
        elif not self._allowed[token // 32] >> token % 32 & 1:
            return False
        if token == self._close:
            self._reasoning = False
        else:
            self._left = self._left and self._left - 1
            self._at_break = self._tokenizer.piece_bytes(token).endswith(b"\n")
        return True

    def copy(self) -> Grammar:
        result = copy.copy(self)
        result._inner = self._inner and self._inner.copy()
        return result


def _bits(tokens: Collection[int], vocab_size: int) -> np.ndarray:
    """Return a mask with the bits of these tokens set."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def _check_row(out: np.ndarray) -> None:
    if out.dtype != np.int32 or out.ndim != 1 or not out.flags.c_contiguous:
        raise TypeError(f"a mask is a contiguous row of int32, not {out.dtype} {out.shape}")


def _arguments_schema(function: Function) -> dict[str, Any]:
    """Return the schema of a call's arguments, always an object."""
    schema = function.parameters or {"properties": {}, "additionalProperties": False}
    return {"type": "object", **schema, "x-guidance": _ARGUMENTS_LAYOUT | {"lenient": not function.strict}}


def _json(schema: Mapping[str, Any]) -> str:
    """Return a grammar's expression for JSON of a schema."""
    return "%json " + json.dumps(schema, ensure_ascii=False)


def _lark(text: str, field: str) -> str:
    """Return a Lark grammar, translating GBNF."""
    try:
        return any_to_lark(text)
    except Exception as error:  # the translation raises whatever it meets
        raise UserError(f"{field}: {_sentence(str(error))}") from None


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _sentence(message: str) -> str:
    """Return an error message of the library on one line, without the state and source that it quotes."""
    return " ".join(re.split(r"<state>|\n\s*\d+ \| ", message)[0].split())[:300]
